"""Llama: it computes what transformers' Llama does, and its checkpoints hold what they should."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bigq.benchmarks import llama
from bigq.benchmarks.float_model import load_float
from bigq.benchmarks.llama import SHAPES, LlamaShape, skeleton, write_checkpoint
from bigq.errors import CheckpointError

SHAPE = LlamaShape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=50)
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    write_checkpoint(SHAPE, tmp_path, torch.float32, CPU)
    return load_float(skeleton(SHAPE, torch.float32), tmp_path, CPU)


def test_it_is_a_llama(model):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    other = transformers.LlamaForCausalLM(config).eval()
    names = {"embed.": "model.embed_tokens.", "norm.": "model.norm.", "head.": "lm_head.", "layers.": "model.layers."}
    inner = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    state = {}
    for name, tensor in model.state_dict().items():
        start = next(start for start in names if name.startswith(start))
        name = names[start] + name.removeprefix(start)
        for own, theirs in inner.items():
            name = name.replace(own, theirs)
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = name.replace(linear, f"self_attn.{linear}")
        for linear in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(linear, f"mlp.{linear}")
        state[name] = tensor
    other.load_state_dict(state)
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "_SHARD_NBYTES", 30_000)
    nbytes = write_checkpoint(SHAPE, tmp_path, torch.bfloat16, CPU)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert nbytes == sum(file.stat().st_size for file in files)
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: file.name for file in files for name in load_file(file)}
    assert held == places
    assert held.keys() == skeleton(SHAPE, torch.bfloat16).state_dict().keys()
    assert (
        SHAPE.nbytes(torch.bfloat16)
        == sum(p.nbytes for p in skeleton(SHAPE, torch.bfloat16).parameters())
        == sum(t.nbytes for file in files for t in load_file(file).values())
    )


def test_as_many_layers_as_come_closest():
    layer = SHAPE.nbytes(torch.bfloat16) - LlamaShape(**{**vars(SHAPE), "layers": 1}).nbytes(torch.bfloat16)
    base = SHAPE.nbytes(torch.bfloat16) - 2 * layer
    assert [SHAPE.of_nbytes(base + part, torch.bfloat16).layers for part in (0, 3 * layer - 9, 3 * layer + 9)] == [
        1,
        3,
        3,
    ]


def test_the_sizes_are_what_they_are_called():
    billions = {name: shape.nbytes(torch.bfloat16) / 2e9 for name, shape in SHAPES.items() if name != "tiny"}
    assert billions == pytest.approx({"135m": 0.163, "1b": 1.498, "8b": 8.03}, rel=0.01)  # heads are not tied


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        write_checkpoint(SHAPE, tmp_path / "missing", torch.bfloat16, CPU)
