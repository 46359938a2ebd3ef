"""examples/mingpt.py, on a stand-in for minGPT and on small checkpoints in its layout."""

import importlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from huggingface_hub import constants, save_torch_state_dict

import bigq

ROOT = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).resolve().parent / "standin"
TEXT = "the quick brown fox jumps over the lazy dog. "
SIZES = (2, 4, 96)  # 96 columns: a block of 64 and half a block
VOCAB_SIZE, BLOCK_SIZE = 128, 64
SHAPE = ("--sizes", *SIZES, "--vocab-size", VOCAB_SIZE, "--block-size", BLOCK_SIZE)
REPORT = re.compile(
    r"(nf4|fp4|int8): ([\d.]+) MB of fp32, loaded in [\d.]+ s as\n(MB .*\n(?:.+\n)*?total .*)\n(.*)\n\n"
)
PACKED_BITS = {"nf4": 4, "fp4": 4, "int8": 8}


@pytest.fixture(scope="module")
def gpt():
    """The stand-in's GPT; its modules are forgotten again afterwards."""
    sys.path.insert(0, str(STANDIN))
    try:
        yield importlib.import_module("mingpt.model").GPT
    finally:
        sys.path.remove(str(STANDIN))
        for name in [name for name in sys.modules if name.partition(".")[0] == "mingpt"]:
            del sys.modules[name]


def build(gpt, sizes=SIZES, vocab_size=VOCAB_SIZE, block_size=BLOCK_SIZE):
    config = gpt.get_default_config()
    config.model_type, config.vocab_size, config.block_size = None, vocab_size, block_size
    config.n_layer, config.n_head, config.n_embd = sizes
    return gpt(config).eval()


@pytest.fixture(scope="module")
def weights(gpt):
    """The state dict of a small model that has learned TEXT by heart."""
    torch.manual_seed(0)
    model = build(gpt)
    windows = torch.tensor(list((TEXT * 3).encode())).unfold(0, BLOCK_SIZE, 1)[: len(TEXT)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        batch = windows[torch.randperm(len(windows))[:8]]
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    return model.state_dict()


@pytest.fixture(scope="module")
def binary(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("binary") / "pytorch_model.bin"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def reports(run_example, binary):
    """What the example says of each format, from the .bin file."""
    arguments = ("--weights", binary, *SHAPE, "--format", "nf4", "fp4", "int8", "--prompt-ids", *b"the quick")
    return parse(run_example("mingpt.py", *arguments, path=[STANDIN]))


def parse(output):
    """{format: (MB before, table, what was generated)}"""
    return {name: (float(before), table, text) for name, before, table, text in REPORT.findall(output)}


def quantized_keys(weights):
    """The weights of the linears in the blocks: not the embeddings, and not the head."""
    return [key for key, tensor in weights.items() if ".h." in key and key.endswith("weight") and tensor.ndim == 2]


def dequantized(weights, name):
    """`weights`, with those of the linears in the blocks quantized to the format `name` and back."""
    config, keys = bigq.QuantizationConfig(name), quantized_keys(weights)
    rounded = {key: bigq.dequantize_tensor(bigq.quantize_tensor(weights[key], config)) for key in keys}
    return weights | rounded


def generate(model, weights, prompt):
    model.load_state_dict(weights)
    return model.half().generate(torch.tensor([prompt]), 20)[0].tolist()


@pytest.fixture
def run(examples, monkeypatch):
    """`run(*arguments)`: the example in this process, which has imported what it needs."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mingpt.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(examples / "mingpt.py"), run_name="__main__")

    return run


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_it_continues_the_text_as_the_dequantized_weights_do(gpt, weights, reports, name):
    _, _, generated = reports[name]
    prompt = list(b"the quick")
    assert generated == str(generate(build(gpt), dequantized(weights, name), prompt))
    assert bytes(json.loads(generated)).decode() == (TEXT * 2)[:29]


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_the_bytes_that_it_prints_are_those_of_the_tensors(weights, reports, name):
    before, table, _ = reports[name]
    assert before == pytest.approx(sum(tensor.nbytes for tensor in weights.values()) / 1e6, abs=0.05)
    linears = [weights[key] for key in quantized_keys(weights)]
    packed = sum(tensor.numel() for tensor in linears) * PACKED_BITS[name] / 8
    scales = sum(len(tensor) * (1 if name == "int8" else -(-tensor.shape[1] // 64)) * 4 for tensor in linears)
    kept = sum(tensor.numel() for tensor in weights.values()) - sum(tensor.numel() for tensor in linears)
    total = dict(zip(("packed", "scales", "kept", "all"), map(float, table.splitlines()[-1].split()[1:]), strict=True))
    assert total["packed"] == pytest.approx(packed / 1e6, abs=0.001)
    assert total["kept"] == pytest.approx(2 * kept / 1e6, abs=0.001)  # half precision, masks included
    described = total["scales"] - scales / 1e6  # what else a format keeps, its description first
    assert -0.001 < described < 0.0005 * len(linears)
    assert total["all"] == pytest.approx(total["packed"] + total["scales"] + total["kept"], abs=0.002)


@pytest.mark.usefixtures("gpt")
def test_sharded_safetensors_and_a_text_prompt(run, weights, reports, tmp_path, capsys):
    save_torch_state_dict(weights, tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    run("--weights", tmp_path, *SHAPE, "--prompt", "the quick")
    found = parse(capsys.readouterr().out)
    assert list(found) == ["nf4", "int8"]
    for name, (before, table, generated) in found.items():
        assert (before, table) == reports[name][:2]
        assert generated == (TEXT * 2)[:29]


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_the_closure_over_the_mlp_calls_the_quantized_modules(gpt, weights, binary, name):
    ids = torch.tensor([list(TEXT.encode())])
    with init_empty_weights():
        model = build(gpt)
    bigq.load_and_quantize_model(model, binary, bigq.QuantizationConfig(name))
    plain, reference = build(gpt), build(gpt)
    plain.load_state_dict(weights)
    reference.load_state_dict(dequantized(weights, name))
    called = set()
    for path, module in model.named_modules():
        if isinstance(module, bigq.QuantizedLinear):
            module.register_forward_hook(lambda *_, path=path: called.add(path))
    with torch.no_grad():
        logits, exact, expected = (m(ids)[0] for m in (model, plain, reference))
    assert called == {key.removesuffix(".weight") for key in quantized_keys(weights)}
    error = (logits - expected).norm() / expected.norm()
    assert error < (0.05 if name == "int8" else 1e-5)  # int8 rounds the activations too
    assert not torch.equal(logits, exact)


@pytest.fixture
def message(run):
    """`message(*arguments)`: what the example exits with; a text means exit code 1."""

    def message(*arguments):
        with pytest.raises(SystemExit) as exit:
            run(*arguments)
        return exit.value.code

    return message


def test_it_says_how_to_install_mingpt(message, monkeypatch):
    monkeypatch.setitem(sys.modules, "mingpt", None)
    monkeypatch.setitem(sys.modules, "mingpt.model", None)
    assert message() == "minGPT is missing: pip install git+https://github.com/karpathy/minGPT"


@pytest.mark.parametrize("start", ["its folder", "a path with ..", "a link"])
def test_it_finds_mingpt_wherever_it_is_started(examples, tmp_path, start):
    """The script has the package's name, and its own folder is on the path under whatever spelling."""
    (tmp_path / "link.py").symlink_to(examples / "mingpt.py")
    script, cwd = {
        "its folder": ("mingpt.py", examples),
        "a path with ..": (examples / ".." / "examples" / "mingpt.py", tmp_path),
        "a link": ("link.py", tmp_path),
    }[start]
    own = [examples, examples / ".." / "examples", "."]  # as a user may have them in PYTHONPATH
    path = os.pathsep.join(map(str, [*own, STANDIN, ROOT, ROOT / "triton_kernels"]))
    command = [sys.executable, str(script), "--weights", "absent.bin", *map(str, SHAPE), "--prompt-ids", "1"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stderr.startswith("--weights absent.bin: ")


@pytest.mark.usefixtures("gpt")
def test_it_says_what_to_do_without_a_network(message, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    text = message("--model-type", "gpt2")
    assert text.startswith("--weights marcsun13/gpt2-xl-linear-sharded: ")
    assert text.endswith("or download the files and pass their folder")
    assert "\n" not in text


@pytest.mark.usefixtures("gpt")
def test_it_says_that_a_path_is_wrong(message, tmp_path):
    text = message("--weights", tmp_path / "absent.bin", *SHAPE, "--prompt-ids", 1)
    assert f"no such file or folder: {tmp_path / 'absent.bin'}" in text
    assert "\n" not in text


@pytest.mark.usefixtures("gpt")
def test_it_says_what_does_not_fit(message, binary):
    text = message("--weights", binary, "--sizes", 1, *SHAPE[2:], "--prompt-ids", 1)
    assert "unexpected (strict=False ignores them):\n  transformer.h.1." in text


@pytest.mark.usefixtures("gpt")
def test_it_says_what_the_tokenizer_needs(message, monkeypatch):
    monkeypatch.setitem(sys.modules, "mingpt.bpe", None)
    text = message("--prompt", "hello")
    assert text.startswith("--prompt needs regex, requests and a network, --prompt-ids does not: ")


@pytest.mark.usefixtures("gpt")
def test_it_refuses_ids_beyond_the_vocabulary(message, capsys):
    assert message("--vocab-size", 128) == 2
    assert capsys.readouterr().err.endswith("error: --prompt-ids goes up to 127\n")


def test_a_real_gpt2_in_mingpts_layout(run_example, gpt, tmp_path):
    spec = importlib.util.find_spec("mgm")
    if spec is None:
        pytest.skip("needs microformer-mgm, which carries a GPT-2 of 8.9M parameters")
    file = Path(spec.origin).parent / "resources" / "general_model" / "pytorch_model.bin"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D
    weights = {key: value.T.contiguous() if key.endswith(transposed) else value for key, value in weights.items()}
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 512, 512).tril() for layer in range(8)}
    torch.save(weights | masks, tmp_path / "pytorch_model.bin")
    shape = ("--sizes", 8, 8, 256, "--vocab-size", 9669, "--block-size", 512)
    arguments = ("--weights", tmp_path, *shape, "--format", "nf4", "--prompt-ids", 2, 100, 200)
    reports = parse(run_example("mingpt.py", *arguments, path=[STANDIN]))
    expected = generate(build(gpt, (8, 8, 256), 9669, 512), dequantized(weights | masks, "nf4"), [2, 100, 200])
    sure = 9  # beyond, the two best tokens are too close to tell apart in half precision
    assert json.loads(reports["nf4"][2])[:sure] == expected[:sure]
