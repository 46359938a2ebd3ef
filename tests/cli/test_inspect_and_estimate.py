"""`bigq inspect` and `bigq estimate`: what they print, and their exit codes."""

import json
from pathlib import Path

import pytest
import torch

import bigq
from bigq import QuantizationConfig
from bigq.cli.app import main
from bigq.cli.limits import parse_limits
from command_page import commands

transformers = pytest.importorskip("transformers", minversion="5.17")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def run(*arguments):
    """The exit code of the command."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code or 0


def said(capsys, *arguments):
    """What a command prints as JSON."""
    capsys.readouterr()
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_inspect(llama, capsys):
    assert run("inspect", llama) == 0
    shown = capsys.readouterr().out
    assert "nobody: it is not quantized" in shown
    assert "model.layers.*.mlp.up_proj.weight" in shown
    assert run("inspect", llama, "--max-memory", "disk=1GB") == 1
    assert "unknown: --max-memory names neither a GPU nor cpu" in capsys.readouterr().out
    assert run("inspect", llama, "--max-memory", "1KB") == 1
    assert "no, the weights as they are" in capsys.readouterr().out
    found = said(capsys, "inspect", llama, "--max-memory", "0=1GB,cpu=2GB")
    assert (found["model"], found["quantized_by"], found["fits"]) == ("LlamaForCausalLM", None, True)
    assert found["limits"] == {"cuda:0": 10**9, "cpu": 2 * 10**9}
    assert found["formats"]["bfloat16"]["parameters"] == found["parameters"]


def test_estimate(llama, capsys):
    assert run("estimate", llama, "--max-memory", "1GB", "--context", "64") == 0
    shown = capsys.readouterr().out
    for words in ("KV cache", "about", "how the numbers are made", 'it fits; load it with device_map="auto"'):
        assert words in shown
    assert run("estimate", llama, "--max-memory", "10KB") == 1
    assert "it does not fit" in capsys.readouterr().out
    assert run("estimate", llama, "--plan") == 0
    assert "the output head:" in capsys.readouterr().out
    one, other = (said(capsys, "estimate", llama, "--format", name)["plan"]["total_nbytes"] for name in ("nf4", "int8"))
    assert one < other
    planned = said(capsys, "estimate", llama, "--plan")["plan"]
    assert sum(row["nbytes"] for row in planned["tensors"]) == planned["total_nbytes"] == one
    trained = said(capsys, "estimate", llama, "--train", "qlora", "--rank", "2")
    assert {"adapters", "optimizer"} < {item["name"] for item in trained["items"]}


def test_estimate_by_rules_and_maps_in_files(llama, capsys, tmp_path):
    rules, places = tmp_path / "rules.json", tmp_path / "map.json"
    written = {"lm_head": "int8", "re:.*[kv]_proj": {"format": "nf4", "block_size": 32}, "*.0": None}
    rules.write_text(json.dumps(written))
    places.write_text(json.dumps({"": "cpu", "model.layers.1": 0}))
    asked = QuantizationConfig("nf4", rules={"lm_head": "int8", "re:.*[kv]_proj": bigq.NF4(block_size=32), "*.0": None})
    found = said(capsys, "estimate", llama, "--format", "nf4", "--rules", str(rules), "--device-map", str(places))
    plan = bigq.plan(llama, asked, json.loads(places.read_text()), other_machine=True)
    assert found["plan"]["nbytes"] == plan.nbytes
    assert found["plan"]["device_map"] == {"": "cpu", "model.layers.1": 0}


def test_a_quantized_folder_is_taken_as_it_is(llama, capsys, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=QuantizationConfig("int8"))
    model.save_pretrained(tmp_path)
    found = said(capsys, "estimate", str(tmp_path), "--device-map", "cpu")
    assert found["plan"]["total_nbytes"] == bigq.memory_footprint(model).total_nbytes
    assert said(capsys, "inspect", str(tmp_path))["quantized_by"] == "bigq"
    assert run("estimate", str(tmp_path), "--format", "nf4") == 1
    assert "the checkpoint holds" in capsys.readouterr().err


def test_refusals_and_usage(llama, capsys, tmp_path):
    for command in ("inspect", "estimate"):
        capsys.readouterr()
        assert run(command, str(tmp_path / "absent")) == 1
        assert capsys.readouterr().err.startswith("error: no such f")
        assert run(command, llama, "--max-memory", "tpu=1GB") == 2
        assert run(command) == 2
    for option in (("--device-map", "nowhere"), ("--train", "all"), ("--context", "0"), ("--format", "nf5")):
        assert run("estimate", llama, *option) == 2
    torch.save({"a": torch.ones(2)}, tmp_path / "model.bin")
    assert run("estimate", str(tmp_path)) == 1
    assert "no config.json" in capsys.readouterr().err


def test_limits_of_devices():
    assert parse_limits(None) is None
    assert parse_limits("12GiB") == {0: 12 << 30}
    sizes = {1: 2 * 10**9, "cpu": 3 * 10**6, 0: 4000, "disk": 10**9}
    assert parse_limits("1=2GB, cpu=3MB,cuda:0=4KB,disk=1GB") == sizes


def test_the_lines_of_the_page_run(llama, capsys, monkeypatch):
    monkeypatch.chdir(Path(llama).parent)
    for heading, count in {"inspect": 4, "estimate": 5}.items():
        lines = commands(heading)
        assert len(lines) == count
        for arguments in lines:
            capsys.readouterr()
            assert run(*arguments) == 0, arguments
        json.loads(capsys.readouterr().out)  # the last has --json
