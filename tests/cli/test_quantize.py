"""`bigq quantize`: its options, what it prints, and every line of its section in docs/command-line.md."""

import json
import re

import pytest
import torch

import bigq
from bigq import FP4, NF4, CheckpointError, ConfigError, Int8, QuantizationConfig, memory_footprint
from bigq.cli import quantize
from bigq.cli.app import main
from bigq.cli.config_options import make_config, read_rules
from command_page import PAGE, commands
from quantized_folders import read_folder

QUERY = "model.layers.0.self_attn.q_proj.weight_packed"

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a Llama in the folder "llama"."""
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", *arguments])
    return stopped.value.code or 0


def formats(folder):
    """{name of a weight in layer 0 or the head: its format} of a quantized folder in bigq's layout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    modules = {**dict(model.model.layers[0].self_attn.named_children()), "lm_head": model.lm_head}
    return {name: getattr(module, "descriptions", {}).get("weight") for name, module in modules.items()}


def test_the_lines_of_the_page_run(folder, capsys):
    lines = commands("quantize")
    (rules,) = re.findall(r"```json\n(.*?)```", PAGE.read_text().split("## inspect")[0], flags=re.DOTALL)
    (folder / "rules.json").write_text(rules.replace("model.layers.0", "*.q_proj"))  # this model has one layer
    assert len(lines) == 11
    model = transformers.AutoModelForCausalLM.from_pretrained("llama")
    bigq.input_moments(model).save("moments.safetensors")
    for arguments in lines:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["150KB" if argument == "12GiB" else argument for argument in arguments])  # of 526 KB
        assert not stopped.value.code, (arguments, capsys.readouterr().err)
    answer = json.loads(capsys.readouterr().out)  # the last has --json
    assert answer["folder"] == "llama-fp4"
    assert answer["nbytes"] == sum(tensor.nbytes for tensor in read_folder(folder / "llama-fp4").values())
    mixed = formats(folder / "llama-mixed")
    assert (mixed["k_proj"].format, mixed["o_proj"].format, mixed["q_proj"]) == (Int8(), NF4(), None)
    assert mixed["lm_head"].format == NF4(block_size=32)
    assert memory_footprint(transformers.AutoModelForCausalLM.from_pretrained("llama-fit")).total_nbytes <= 150_000
    assert len({what and what.format for what in formats(folder / "llama-5bit").values()}) > 1
    searched, plain = (read_folder(folder / name) for name in ("llama-searched", "llama-nf4"))
    assert searched.keys() == plain.keys()
    assert not torch.equal(searched[QUERY], plain[QUERY])
    small = formats(folder / "llama-small")
    assert small["lm_head"].format == NF4(block_size=128, double_quant=True)


def test_what_it_prints(folder, capsys):
    assert run("llama", "to", "--device", "cpu") == 0
    out = capsys.readouterr().out
    nbytes = sum(tensor.nbytes for tensor in read_folder(folder / "to").values())
    before = sum(tensor.nbytes for tensor in read_folder(folder / "llama").values())
    assert out.splitlines()[:3] == [
        "to",
        "  7 weights quantized, 5 tensors kept",
        f"  {nbytes / 1e3:.0f} KB in one file, {nbytes / before:.0%} of {before / 1e3:.0f} KB",
    ]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["llama"], 2, "Missing argument 'DST'"),
        (["llama", "to", "--format", "nf5"], 2, "'nf5'; expected one of nf4, fp4, int8"),
        (["llama", "to", "--layout", "gguf"], 2, "'gguf'; expected one of bigq"),
        (["./nowhere", "to"], 1, "error: no such folder: nowhere"),
        (["llama", "llama"], 1, "error: source and destination are both llama"),
        (["llama", "to", "--skip", "layres"], 1, "layres"),
        (["llama", "to", "--rules", "none.json"], 1, "cannot read the rules in none.json: No such file or directory"),
        (["llama", "to", "--format", "int8", "--double-quant"], 1, "double_quant=True means nothing to format 'int8'"),
        (["llama", "to", "--fit", "1GB", "--bits", "5"], 2, "two budgets: give one of them"),
        (["llama", "to", "--fit", "1GB", "--layout", "bitsandbytes"], 2, "which only the layout bigq holds"),
        (["llama", "to", "--fit", "1KB"], 1, "max_bytes='1KB' is too little"),
        (["llama", "to", "--sensitivity", "output"], 2, "--sensitivity is for --fit and --bits"),
        (["llama", "to", "--method", "search"], 1, "--method search needs --moments FILE"),
        (["llama", "to", "--dtype", "int4"], 1, "dtype is 'int4'"),
        (["llama", "to", "--layout", "compressed-tensors"], 1, "cannot hold 7 weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(folder, capsys, arguments, code, words):
    assert run(*arguments) == code
    shown = capsys.readouterr()
    assert words in re.sub(r"[\s│]+", " ", shown.err)
    assert shown.out == ""
    assert not (folder / "to").exists()


def test_what_would_fail_after_the_float_model_is_measured_fails_before(folder, capsys):
    assert run("llama", "taken") == 0
    refused = {
        ("llama", "taken", "--bits", "5"): "taken is not empty, it holds",
        ("taken", "to", "--bits", "5"): "taken is quantized already (quant_method 'bigq')",
        ("llama", "to", "--bits", "0"): "bits is 0.0; expected a number of bits, such as 5.0",
        ("llama", "to", "--fit", "foo"): "max_bytes is 'foo'",
    }
    for arguments, words in refused.items():
        capsys.readouterr()
        assert run(*arguments) == 1
        err = capsys.readouterr().err
        assert words in err
        assert "Loading weights" not in err


def test_formats_of_an_encoder_are_fitted_by_its_output(folder, capsys):
    """It returns no logits, whose distribution the default measures."""
    config = transformers.BertConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.BertModel(config).save_pretrained("encoder")
    assert run("encoder", "to", "--bits", "6") == 1
    assert "returned no logits" in capsys.readouterr().err
    assert run("encoder", "to", "--bits", "6", "--sensitivity", "output", "--json") == 0
    fitted = json.loads(capsys.readouterr().out)["fit"]
    assert fitted["sensitivity"] == "output"
    assert 4.5 < fitted["bits"] <= 6


def test_ctrl_c_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "quantize_checkpoint", interrupted)
    assert run("llama", "to") == 130
    said = ["run it again, without --overwrite, to go on with the files that are not finished", "interrupted"]
    assert capsys.readouterr().err.splitlines() == said


def test_nothing_is_done_for_a_push_that_cannot_be(folder, capsys, monkeypatch):
    monkeypatch.setattr("bigq.converting.push.get_token", lambda: None)
    assert run("llama", "to", "--push", "owner/name") == 1
    assert "run `hf auth login`" in capsys.readouterr().err
    assert not (folder / "to").exists()
    monkeypatch.setattr(quantize, "refuse_without_token", lambda: None)
    pushed = []
    monkeypatch.setattr(quantize, "push_folder", lambda *args, **settings: pushed.append((args, settings)) or "there")
    assert run("llama", "to", "--push", "owner/name", "--private", "--json") == 0
    assert json.loads(capsys.readouterr().out)["address"] == "there"
    ((to, name), settings), *_ = pushed
    assert (str(to), name, settings) == ("to", "owner/name", {"private": True})


def test_the_config_that_options_make(tmp_path):
    assert make_config(None) == QuantizationConfig("nf4")
    assert make_config("fp4", block_size=32, double_quant=True) == QuantizationConfig(
        FP4(block_size=32, double_quant=True)
    )
    made = make_config("int8", skip=["lm_head"], also=["embed"], dtype="bf16", compute_dtype="fp16")
    assert made == QuantizationConfig(
        "int8", skip_modules=["lm_head"], also_quantize=["embed"], dtype=torch.bfloat16, compute_dtype=torch.float16
    )
    (tmp_path / "rules.json").write_text('{"*.mlp": {"format": "int8", "threshold": 0.0}, "a": "fp4", "b": null}')
    rules = {"*.mlp": Int8(threshold=0.0), "a": FP4(), "b": None}
    assert make_config(None, rules=tmp_path / "rules.json") == QuantizationConfig(rules=rules)
    assert make_config("nf4", rules=tmp_path / "rules.json") == QuantizationConfig("nf4", rules=rules)
    (tmp_path / "saved.json").write_text(json.dumps(QuantizationConfig(rules=rules).to_dict()["rules"]))
    assert list(read_rules(tmp_path / "saved.json").items()) == list(rules.items())


@pytest.mark.parametrize(
    "text, error, words",
    [
        ("{", CheckpointError, r"rules\.json is no JSON"),
        ('{"a": 4}', ConfigError, r"the rule 'a' is 4; expected the name of a format"),
        ('{"a": {"block_size": 32}}', ConfigError, r'expected the name of a format, an object with "format"'),
        ('{"a": "nf5"}', ConfigError, "format is 'nf5'; expected"),
        (
            '{"a": {"format": "nf4", "blocksize": 3}}',
            ConfigError,
            "'nf4' has no blocksize; expected block_size, double",
        ),
        ("{}", ConfigError, r"rules\.json holds no rules"),
        ('{"a": "nf4", "a": "fp4"}', ConfigError, "gives 'a' twice"),
        ("[1]", ConfigError, r"holds no rules; expected \{pattern: format\}"),
        ('"nf4"', ConfigError, "holds no rules"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith(("{", "[", '"')) else "",
)
def test_files_that_are_no_rules(tmp_path, text, error, words):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(error, match=words):
        read_rules(tmp_path / "rules.json")
