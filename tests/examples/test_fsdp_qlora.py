"""examples/fsdp_qlora.py: two processes learn what one learns, and each of them holds half of the model."""

import re
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights

from bigq import load_and_quantize_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def trained(examples, assets, tmp_path):
    """trained(processes): what the example printed, as {name: number}, and the folder that it wrote."""
    from story_model import story_model

    folder = story_model(assets, tmp_path / "story")
    text = tmp_path / "text.txt"
    text.write_text((assets / "text" / "tinyshakespeare.txt").read_text()[:20000])

    def run(processes):
        output = tmp_path / f"of-{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += [str(examples / "fsdp_qlora.py"), str(text), "--model", str(folder), "--steps", "4"]
        done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said = re.findall(r"^(\S.*?) +([\d.]+)$", done.stdout, flags=re.MULTILINE)
        return {name: float(value) for name, value in said}, output

    return run


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_two_processes_learn_what_one_learns(trained):
    (alone, folder), (together, shards) = trained(1), trained(2)
    assert list(together) == ["megabytes on each GPU", "held-out loss, nf4", "held-out loss, with adapter"]
    assert together["held-out loss, nf4"] == alone["held-out loss, nf4"]
    assert together["held-out loss, with adapter"] < alone["held-out loss, nf4"] - 0.1
    assert abs(together["held-out loss, with adapter"] - alone["held-out loss, with adapter"]) < 0.02
    assert together["megabytes on each GPU"] < 0.55 * alone["megabytes on each GPU"]
    for output in (folder, shards):
        with init_empty_weights():
            skeleton = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(output / "merged")
            )
        merged = load_and_quantize_model(skeleton, output / "merged", device_map="cpu")
        config = peft.PeftConfig.from_pretrained(output / "adapter")
        base = transformers.AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=torch.bfloat16)
        adapted = peft.PeftModel.from_pretrained(base, output / "adapter").merge_and_unload()
        weight, expected = (each.model.layers[0].mlp.up_proj.weight.float() for each in (merged, adapted))
        assert (weight - expected).norm() / expected.norm() < 0.12  # what quantizing to NF4 loses


def test_it_is_under_eighty_lines(examples):
    text = (examples / "fsdp_qlora.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert "torchrun --nproc-per-node 2 examples/fsdp_qlora.py" in text[:400]
