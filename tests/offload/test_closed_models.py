"""Modules that take no new attributes, or hand them to a module inside, and models made in inference mode."""

import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from bigq import QuantizationConfig, QuantizedLinear, UnsupportedError, load_and_quantize_model, materialize
from dequantized import dequantized

CONFIG = QuantizationConfig("nf4", offload="quantized")
X = torch.linspace(-1, 1, 48).view(3, 16)


class Sealed:
    """Refuses every attribute that it does not have already, once it is built."""

    def seal(self):
        vars(self)["is_sealed"] = True
        return self

    def __setattr__(self, name, value):
        if vars(self).get("is_sealed") and not hasattr(self, name):
            raise AttributeError(f"{type(self).__name__} is sealed")
        super().__setattr__(name, value)


class SealedLinear(Sealed, nn.Linear):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.down(self.up(x).relu()))


class WithSealedLinear(Model):
    def __init__(self):
        super().__init__()
        self.down = SealedLinear(32, 16).seal()


def build(kind):
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(build(Model).state_dict(), tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def test_a_model_with_a_sealed_module_loads_on_one_device(checkpoint):
    model = load_and_quantize_model(build(WithSealedLinear), checkpoint, CONFIG, "cpu")
    assert isinstance(model.up, QuantizedLinear)
    assert isinstance(model.down, QuantizedLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(X), dequantized(model, build(Model))(X))


def test_an_offloaded_module_that_takes_no_hook_is_refused(checkpoint):
    model = build(WithSealedLinear)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"takes no new attributes \(\w+ is sealed\)"):
        load_and_quantize_model(model, checkpoint, CONFIG, {"": "disk"})
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("_hf_hook" in vars(module) or "_bigq_probe" in vars(module) for module in model.modules())


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu", "_orig_mod.down": "disk"}], ids=["all", "a block"])
def test_the_wrapper_of_torch_compile_is_offloaded(device_map, tmp_path):
    """It hands attributes to the module inside, which may have a hook of its own."""

    def wrapped():
        return torch.compile(build(Model), backend="eager")

    torch.save(wrapped().state_dict(), tmp_path / "checkpoint.pt")
    model = load_and_quantize_model(wrapped(), tmp_path / "checkpoint.pt", CONFIG, device_map)
    with torch.no_grad():
        expected = dequantized(model._orig_mod, build(Model))(X)
        for _ in range(2):
            torch.testing.assert_close(model(X), expected)
    Accelerator().save_model(model, tmp_path / "saved")
    again = load_and_quantize_model(wrapped(), tmp_path / "saved", None, "cpu")
    inside = pickle.loads(pickle.dumps(model._orig_mod))
    with torch.no_grad():
        torch.testing.assert_close(again(X), expected)
        torch.testing.assert_close(inside(X), expected)
        torch.testing.assert_close(materialize(model)(X), expected)
    assert not any("_hf_hook" in vars(module) for module in model.modules())


def test_a_model_that_was_made_in_inference_mode_is_quantized_in_place():
    with torch.inference_mode():
        model = build(Model)
    load_and_quantize_model(model, None, CONFIG, "cpu")
    with torch.inference_mode():
        torch.testing.assert_close(model(X), dequantized(model, build(Model))(X))
