"""examples/qlora.py: it learns, and what it saves is what it printed."""

import re
import runpy
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

from bigq import QuantizationConfig, QuantizedLinear, load_and_quantize_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def skeleton(folder):
    with init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder)).eval()
    model.tie_weights()
    return model


def as_bitsandbytes(folder):
    """The model as transformers loads it with bitsandbytes, in a process of its own: {name: tensor} of its state."""
    code = f"""
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, device_map="cpu")
assert "bigq" not in sys.modules
tensors = {{name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}}
torch.save(tensors, {str(folder / "theirs.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    return torch.load(folder / "theirs.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_it_learns_merges_and_saves(name, run_example, assets, tmp_path):
    from story_model import story_model

    folder = story_model(assets, tmp_path / "story")
    text = tmp_path / "text.txt"
    text.write_text((assets / "text" / "tinyshakespeare.txt").read_text()[:60000])
    output = run_example(
        "qlora.py", text, "--model", folder, "--format", name, "--steps", 50, "--output", tmp_path / "out",
        tolerated="Failed to load CPU",
    )  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"loss at step \d+ +([\d.]+)", output)]
    assert losses[-1] < 0.7 * losses[0]
    perplexities = {key.strip(): float(value) for key, value in re.findall(r"perplexity, (.{15}) +([\d.]+)", output)}
    assert list(perplexities) == [name, "with adapter", "merged"]
    assert perplexities["with adapter"] < 0.3 * perplexities[name]
    rounding = 1.3 if name == "nf4" else 1.01
    assert perplexities["merged"] < rounding * perplexities["with adapter"]

    merged = load_and_quantize_model(skeleton(folder), tmp_path / "out" / "merged", device_map="cpu")
    skipped = [] if name == "int8" else ["down_proj"]
    base = load_and_quantize_model(skeleton(folder), folder, QuantizationConfig(name, skip_modules=skipped), "cpu")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").merge_and_unload()
    assert sum(isinstance(module, QuantizedLinear) for module in merged.modules()) == (7 - len(skipped)) * 5
    assert merged.state_dict().keys() == again.state_dict().keys()
    differing = [key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, again.state_dict()[key])]
    assert [key for key in differing if not key.endswith("quant_state")] == []  # bitsandbytes names a compute dtype

    pytest.importorskip("bitsandbytes")
    saved = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    theirs = as_bitsandbytes(tmp_path / "out" / "merged")
    assert {key for key in theirs if key not in saved} <= {"lm_head.weight"}  # tied to the embedding
    differing = [key for key, tensor in saved.items() if not torch.equal(theirs[key].view(tensor.shape), tensor)]
    assert differing == []


@pytest.mark.parametrize("missing", ["peft", "transformers"])
def test_it_says_what_to_install(examples, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(examples / "qlora.py"), run_name="__main__")
    assert exit.value.code == f"{missing} is missing: pip install -c constraints.txt -e '.[examples]'"


def test_it_is_under_eighty_lines(examples):
    assert len((examples / "qlora.py").read_text(encoding="utf-8").splitlines()) < 80
