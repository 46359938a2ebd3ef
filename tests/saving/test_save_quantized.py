"""save_quantized: what it writes loads again bit for bit, in every layout, and what a layout cannot hold is refused."""

import json
import os

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import (
    FP4,
    NF4,
    ConfigError,
    Int8,
    QuantizationConfig,
    UnsupportedError,
    load_and_quantize_model,
    save_quantized,
)
from bigq.model.placeholders import hold_placeholders

FORMATS = {
    "nf4": NF4(),
    "fp4-double": FP4(block_size=32, double_quant=True),
    "int8": Int8(threshold=4.0),
}


def quantized(tiny, empty, folder, weight_format, device_map="cpu", width=64, **settings):
    """A TinyModel loaded from a checkpoint, so that it may be offloaded."""
    torch.manual_seed(0)
    torch.save(tiny(width=width, **settings).state_dict(), folder / "plain.bin")
    compute_dtype = None if isinstance(weight_format, Int8) else "fp32"  # no other library has one for int8
    config = QuantizationConfig(weight_format, compute_dtype=compute_dtype, offload="quantized")
    model = empty(tiny, width=width, **settings)
    return load_and_quantize_model(model, folder / "plain.bin", config, device_map, progress=False)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu", "blocks.1": "disk"}], ids=["cpu", "disk"])
@pytest.mark.parametrize("layout", ["bigq", "bitsandbytes"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_it_writes_loads_with_the_same_bits(tiny, empty, ids, tmp_path, name, layout, device_map):
    model = quantized(tiny, empty, tmp_path, FORMATS[name], device_map)
    save_quantized(model, tmp_path / "saved", layout=layout)
    again = load_and_quantize_model(empty(tiny, width=64), tmp_path / "saved", device_map="cpu", progress=False)
    expected = model.state_dict()
    assert_same(again.state_dict(), expected)
    assert torch.equal(again(ids), model(ids))


def test_bigqs_layout_is_what_save_model_writes(tiny, empty, tmp_path):
    model = quantized(tiny, empty, tmp_path, NF4(double_quant=True))
    save_quantized(model, tmp_path / "ours")
    Accelerator().save_model(model, tmp_path / "theirs")
    assert os.listdir(tmp_path / "ours") == os.listdir(tmp_path / "theirs") == ["model.safetensors"]
    assert_same(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs")))


def test_bitsandbytes_tensors_are_views_in_other_shapes(tiny, empty, tmp_path):
    model = quantized(tiny, empty, tmp_path, NF4(double_quant=True))
    hold_placeholders(model)  # as a transformers model does
    save_quantized(model, tmp_path / "saved", layout="bitsandbytes")
    saved, up = load_file(tmp_path / "saved" / "model.safetensors"), model.blocks[0].up
    assert saved["blocks.0.up.weight"].shape == (192 * 64 // 2, 1)
    assert torch.equal(saved["blocks.0.up.weight"].view(192, 32), up.weight_packed)
    assert torch.equal(saved["blocks.0.up.weight.absmax"].view(192, 1), up.weight_absmax)
    assert torch.equal(saved["blocks.0.up.weight.nested_absmax"].view(torch.int32), up.weight_nested_absmax)
    assert saved["blocks.0.up.weight.quant_map"].shape == (16,)
    assert saved["blocks.0.up.weight.nested_quant_map"].shape == (256,)
    said = json.loads(bytes(saved["blocks.0.up.weight.quant_state.bitsandbytes__nf4"].tolist()))
    offset = said.pop("nested_offset")
    assert torch.tensor([offset]).view(torch.int32) == up.weight_nested_offset
    assert said == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [192, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }
    assert not [name for name in saved if "packed" in name or name.endswith(".quant_state")]
    assert torch.equal(saved["blocks.0.up.bias"], up.bias)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == "float32"
    assert config["llm_int8_skip_modules"] == ["head"]


def test_compressed_tensors(tiny, empty, tmp_path):
    model = quantized(tiny, empty, tmp_path, Int8(), {"": "cpu", "blocks.1": "disk"})
    hold_placeholders(model)  # as a transformers model does
    save_quantized(model, tmp_path / "saved", layout="compressed-tensors")
    saved, down = load_file(tmp_path / "saved" / "model.safetensors"), model.blocks[1].down
    assert torch.equal(saved["blocks.1.down.weight"], down.weight_packed)
    assert saved["blocks.1.down.weight_scale"].shape == (64, 1)
    assert torch.equal(saved["blocks.1.down.weight_scale"], down.weight_absmax.view(torch.float32) / 127)
    assert not [name for name in saved if "packed" in name or name.endswith("quant_state")]
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == {
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**int8, "strategy": "channel", "dynamic": False},
                    "input_activations": {**int8, "strategy": "token", "dynamic": True},
                }
            },
            "format": "int-quantized",
            "ignore": ["head"],
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
    }


@pytest.mark.parametrize("layout", ["bigq", "bitsandbytes"])
def test_shards_replace_the_files_of_an_earlier_call(tiny, empty, tmp_path, layout):
    model = quantized(tiny, empty, tmp_path, NF4())
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "model.safetensors.backup").write_text("")
    save_quantized(model, folder, layout=layout)
    save_quantized(model, folder, layout=layout, max_shard_size="20KB", metadata={"of": "tiny"})
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 3
    assert max(shard.stat().st_size for shard in shards) < 25_000
    assert not (folder / "model.safetensors").exists()
    assert (folder / "model.safetensors.backup").exists()
    with safe_open(shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "tiny"}
    again = load_and_quantize_model(empty(tiny, width=64), folder, device_map="cpu", progress=False)
    assert_same(again.state_dict(), model.state_dict())
    save_quantized(model, folder, layout=layout)
    assert sorted(path.name for path in folder.glob("model*")) == ["model.safetensors", "model.safetensors.backup"]


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_files_may_be_read_by_whom_the_umask_says(tiny, empty, tmp_path, umask):
    model = quantized(tiny, empty, tmp_path, NF4())
    before = os.umask(umask)
    try:
        save_quantized(model, tmp_path / "saved", layout="bitsandbytes", max_shard_size="20KB")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o666 & ~umask}


def test_it_may_replace_the_files_that_the_model_is_offloaded_to(tiny, empty, ids, tmp_path):
    model, folder = quantized(tiny, empty, tmp_path, NF4()), tmp_path / "saved"
    save_quantized(model, folder)
    loaded = load_and_quantize_model(empty(tiny, width=64), folder, device_map={"": "cpu", "blocks": "disk"})
    save_quantized(loaded, folder, layout="bitsandbytes")
    assert torch.equal(loaded(ids), model(ids))
    again = load_and_quantize_model(empty(tiny, width=64), folder, device_map="cpu")
    assert_same(again.state_dict(), model.state_dict())


def test_a_config_json_that_is_there_keeps_what_else_it_says(tiny, empty, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text('{"_class_name": "Tiny"}')
    save_quantized(quantized(tiny, empty, tmp_path, NF4()), tmp_path / "saved", layout="bitsandbytes")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).keys() == {"_class_name", "quantization_config"}


def test_tied_tensors_are_written_once(tiny, empty, tmp_path):
    model = quantized(tiny, empty, tmp_path, NF4(), tied=True)
    save_quantized(model, tmp_path / "saved", layout="bitsandbytes")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("embed.weight" in saved, "head.weight" in saved) == (True, False)
    again = load_and_quantize_model(empty(tiny, width=64, tied=True), tmp_path / "saved", device_map="cpu")
    assert_same(again.state_dict(), model.state_dict())


class Two(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        if tied:
            self.second.weight = self.first.weight


class Named(nn.Module):
    """A linear that is kept, and whose name is the end of the name of one that is quantized."""

    def __init__(self):
        super().__init__()
        self.proj, self.inner, self.out = nn.Linear(64, 64), nn.Sequential(), nn.Linear(64, 2)
        self.inner.k_proj = nn.Linear(64, 64)


def test_patterns_of_kept_linears_match_no_other(tmp_path):
    model = load_and_quantize_model(Named(), None, QuantizationConfig("nf4", skip_modules=["proj"]), "cpu")
    save_quantized(model, tmp_path, layout="bitsandbytes")
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["llm_int8_skip_modules"] == ["^proj$", "out"]


class TestRefusals:
    def refused(self, model, tmp_path, layout, words, error=UnsupportedError):
        with pytest.raises(error, match=words):
            save_quantized(model, tmp_path / "saved", layout=layout)
        assert not (tmp_path / "saved").exists()

    def test_an_unknown_layout(self, tiny, empty, tmp_path):
        model = quantized(tiny, empty, tmp_path, NF4())
        self.refused(model, tmp_path, "gguf", r"layout is 'gguf'; expected one of \['bigq',", ConfigError)

    def test_other_arguments(self, tiny, empty, tmp_path):
        model = quantized(tiny, empty, tmp_path, NF4())
        save_quantized(model, tmp_path / "saved")
        before = (tmp_path / "saved" / "model.safetensors").read_bytes()
        with pytest.raises(ConfigError, match=r"metadata holds 'step': 3; expected strings"):
            save_quantized(model, tmp_path / "saved", metadata={"step": 3})
        with pytest.raises(ConfigError, match=r"max_shard_size is 'large'; expected bytes"):
            save_quantized(model, tmp_path / "saved", max_shard_size="large")
        assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before

    def test_a_model_that_is_not_quantized(self, tiny, tmp_path):
        self.refused(tiny(), tmp_path, "bigq", "TinyModel holds no quantized weight")

    def test_rows_that_are_no_multiple_of_the_block_size(self, tiny, empty, tmp_path):
        model = quantized(tiny, empty, tmp_path, NF4(), width=72)
        words = r"cannot hold 6 weights of the model: blocks\.0\.up\.weight: a row has 72 numbers.*layout='bigq'"
        self.refused(model, tmp_path, "bitsandbytes", words)

    @pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
    def test_what_is_no_linear(self, layout, tmp_path):
        config = QuantizationConfig("int8", also_quantize=["0"])
        model = load_and_quantize_model(nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 2)), None, config, "cpu")
        self.refused(model, tmp_path, layout, r"cannot hold 1 weights of the model: 0\.weight: it is not the weight of")

    def test_4_bits_in_compressed_tensors(self, tiny, empty, tmp_path):
        model = quantized(tiny, empty, tmp_path, NF4())
        self.refused(model, tmp_path, "compressed-tensors", r"up\.weight: it has no format 'nf4'; expected 'int8'")

    def test_tied_quantized_weights(self, tmp_path):
        config = QuantizationConfig("nf4", also_quantize=["first", "second"])
        model = load_and_quantize_model(Two(), None, config, "cpu")
        self.refused(model, tmp_path, "bitsandbytes", r"first\.weight: it is tied to second\.weight")
        save_quantized(model, tmp_path)
        with torch.device("meta"):
            skeleton = Two()
        again = load_and_quantize_model(skeleton, tmp_path, device_map="cpu")
        assert again.second.weight_packed is again.first.weight_packed
        assert_same(again.state_dict(), model.state_dict())

    @pytest.mark.parametrize("other", ["fp4", "int8"])
    def test_several_formats(self, tmp_path, other):
        states = {}
        for name, kind in (("first", "nf4"), ("second", other)):
            torch.manual_seed(0)
            config = QuantizationConfig(kind, also_quantize=["second"])
            state = load_and_quantize_model(Two(tied=False), None, config, "cpu").state_dict()
            states |= {key: tensor for key, tensor in state.items() if key.startswith(name)}
        save_file(states, tmp_path / "mixed.safetensors")
        model = load_and_quantize_model(Two(tied=False), tmp_path / "mixed.safetensors", device_map="cpu")
        self.refused(model, tmp_path, "bitsandbytes", rf"one format for a whole model.*first.* nf4.*second.* {other}")
        save_quantized(model, tmp_path / "own")
        assert_same(load_file(tmp_path / "own" / "model.safetensors"), states)

    def test_what_is_no_tensor(self, tmp_path):
        class Extra(nn.Linear):
            def get_extra_state(self):
                return {"step": 3}

            def set_extra_state(self, state):
                pass

        model = load_and_quantize_model(nn.Sequential(Extra(64, 64), nn.Linear(64, 2)), None, "nf4", "cpu")
        self.refused(model, tmp_path, "bigq", r"it holds objects that are no tensors: 0\._extra_state")

    @pytest.mark.parametrize(
        "tensor, reason",
        [
            (torch.eye(3).to_sparse(), "tensors that are not dense: 1.table"),
            (torch.ones(3, dtype=torch.complex128), r"no safetensors file has: 1.table \(torch.complex128\)"),
        ],
        ids=["sparse", "complex128"],
    )
    def test_what_safetensors_has_not(self, tensor, reason, tmp_path):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        model[1].register_buffer("table", tensor)
        self.refused(load_and_quantize_model(model, None, "nf4", "cpu"), tmp_path, "bigq", reason)

    def test_tensors_on_meta(self, tiny, empty, tmp_path):
        model = quantized(tiny, empty, tmp_path, NF4())
        model.gain = nn.Parameter(torch.empty(64, device="meta"))
        self.refused(model, tmp_path, "bitsandbytes", "it holds tensors on meta: gain")
