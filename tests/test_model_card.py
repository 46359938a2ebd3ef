"""model_card: what it counts, and what transformers' push_to_hub uploads with and without it."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import bigq
from bigq import QuantizationConfig, UnsupportedError
from mock_hub import mock_hub

ROOT = Path(__file__).parents[1]


def rows(card):
    lines = [line for line in card.text.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in lines]


def test_the_table_counts_every_weight_once():
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
    config = QuantizationConfig("int8", threshold=0.0, also_quantize=["0"])
    bigq.load_and_quantize_model(model, None, config, "cpu")
    card = bigq.model_card(model, base_model="owner/base")
    assert rows(card) == [
        ("*.weight", "int8, threshold=0.0", "2", "5,120", str(f"{5120 + 80 * 4 + 512:,}")),
        ("*.bias", "float32", "3", "136", "544"),
        ("*.weight", "float32", "2", "576", "2,304"),
    ]
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert f"{bigq.num_parameters(model):,} parameters in {nbytes:,} bytes" in card.text
    assert card.data.tags == ["bigq", "int8"]
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/base", "quantized")


def test_a_plain_model_has_none():
    with pytest.raises(UnsupportedError, match="Linear holds no quantized weight"):
        bigq.model_card(nn.Linear(2, 2))


def test_push_to_hub_uploads_a_folder_that_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    (tmp_path / "pushed").mkdir()
    code = """
import sys
import bigq, torch
from transformers import AutoModelForCausalLM
plain, mirror = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=bigq.QuantizationConfig("nf4"))
model.push_to_hub("owner/name", token="hf_none")
torch.save(model.state_dict(), mirror)
"""
    with mock_hub(tmp_path / "pushed") as address:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "triton_kernels")])
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "PYTHONPATH": paths}
        arguments = [str(tmp_path / "plain"), str(tmp_path / "mirror.pt")]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert {"README.md", "config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "pushed").iterdir()}
    assert "- bigq" in (tmp_path / "pushed" / "README.md").read_text()

    import_module("bigq.integrations.transformers")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pushed")
    expected = torch.load(tmp_path / "mirror.pt")
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
