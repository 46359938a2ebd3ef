"""PEFT on models that transformers' from_pretrained has quantized with bigq."""

import pytest
import torch

from bigq import NF4, Int8, QuantizationConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from adapted import logits, moved, quantized, state, tuned  # noqa: E402  # it imports peft
from tuners import llama, lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


@pytest.fixture
def load(tmp_path, weight_format):
    """load(): the model of `quantized`, by from_pretrained."""
    llama().save_pretrained(tmp_path / "float")
    config = QuantizationConfig(weight_format)
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)


def test_an_adapter_works_on_a_model_of_either_loader(load, weight_format, tmp_path):
    model = moved(tuned(load(), lora()))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(quantized(weight_format), tmp_path / "adapter")), expected)
    base = load()
    base.load_adapter(str(tmp_path / "adapter"))  # the method of transformers
    assert torch.equal(logits(base), expected)


def test_a_merged_model_is_saved_and_loaded_by_transformers(load, tmp_path):
    model = moved(tuned(load(), lora()))
    before = state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
