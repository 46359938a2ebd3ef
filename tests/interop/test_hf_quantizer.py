"""HfQuantizer: what `save_pretrained` is given reaches the quantizer that it asks."""

import inspect

import pytest
import torch

from bigq import QuantizationConfig, load_and_quantize_model

transformers = pytest.importorskip("transformers", minversion="5.17")
from bigq.interop.hf_quantizer import HfQuantizer, given_state  # noqa: E402 - it needs transformers
from tuners import llama  # noqa: E402

NOTHING = (None, True)


class Asking(HfQuantizer):
    """Notes what it finds."""

    def get_state_dict_and_metadata(self, model):
        self.found = given_state()
        return super().get_state_dict_and_metadata(model)


@pytest.fixture(scope="module")
def model():
    model = load_and_quantize_model(llama(), None, QuantizationConfig("nf4"), "cpu", progress=False)
    model.hf_quantizer = Asking(model.hf_quantizer.quantization_config, pre_quantized=True)
    return model


STATE = {"weight": torch.zeros(1)}
CALLS = {
    "nothing": ((), {}, NOTHING),
    "by name": ((), {"state_dict": STATE, "is_main_process": False}, (STATE, False)),
    "by place": ((False, STATE), {}, (STATE, False)),
    "of the first process": ((), {"state_dict": STATE}, (STATE, True)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_quantizer_is_told_what_is_given(name, model, tmp_path):
    args, kwargs, expected = CALLS[name]
    model.save_pretrained(tmp_path, *args, **kwargs)
    assert model.hf_quantizer.found == expected
    assert given_state() == NOTHING


def test_nothing_is_left_after_an_error(model, tmp_path, monkeypatch):
    def fail(self, model):
        raise ArithmeticError("while it is saved")

    monkeypatch.setattr(Asking, "get_state_dict_and_metadata", fail)
    with pytest.raises(ArithmeticError):
        model.save_pretrained(tmp_path, state_dict=STATE)
    assert given_state() == NOTHING


def test_a_model_without_a_quantizer_is_saved_as_before(tmp_path, model):
    plain = llama()
    plain.save_pretrained(tmp_path / "plain", state_dict=plain.state_dict())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(own, plain.get_parameter(name)) for name, own in again.named_parameters())


def test_transformers_has_the_arguments_that_are_read():
    """If this fails, transformers has renamed them, and shards are refused with the words of `save_quantized`."""
    parameters = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    assert {"state_dict", "is_main_process"} <= parameters.keys()
    assert parameters["is_main_process"].default is True
