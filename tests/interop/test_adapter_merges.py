"""adapter_merges: what a merge keeps, and when it is put back."""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch
from torch import nn

from bigq import NF4, QuantizationConfig, load_and_quantize_model


class Tuner(nn.Module):
    """A tuner layer as PEFT's are, which adds `delta` to the weight of the module that it adapts."""

    def __init__(self, base_layer, delta):
        super().__init__()
        self.base_layer = base_layer
        self.delta = delta
        self.merged = False

    def forward(self, x):
        return self.base_layer(x)

    def merge(self):
        self.base_layer.weight.data += self.delta
        self.merged = True

    def unmerge(self):
        self.base_layer.weight.data -= self.delta
        self.merged = False


class Failing(Tuner):
    def merge(self):
        self.base_layer.weight.data += self.delta
        raise ArithmeticError("after the weight was written")


class NeverUnmerged(Tuner):
    def unmerge(self):
        raise NotImplementedError("cannot be unmerged")


class NotATuner(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


@pytest.fixture
def linear():
    config = QuantizationConfig(NF4(double_quant=True), skip_defaults=False)
    return load_and_quantize_model(nn.Sequential(nn.Linear(64, 32)).bfloat16(), None, config, "cpu")[0]


def tuner(linear, kind=Tuner):
    return kind(linear, 0.1 * torch.randn(32, 64))


def state(module):
    return {name.rpartition(".")[2]: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in state(module).items())


def test_the_bits_and_the_dtype_come_back_and_the_parameters_are_the_same(linear):
    before, parameters = state(linear), list(linear.parameters())
    layer = tuner(linear)
    for _ in range(2):
        layer.merge()
        assert not same(linear, before)
        layer.unmerge()
        assert same(linear, before)
    assert linear.weight.dtype == torch.bfloat16
    assert all(own is parameter for own, parameter in zip(linear.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_unmerges_itself(linear, copied, when):
    before = state(linear)
    layer = tuner(linear)
    if when == "after":
        layer.merge()
    again = copied(layer)
    if when == "before":
        again.merge()
        assert same(linear, before)
    again.unmerge()
    assert same(again.base_layer, before)
    assert same(linear, before) == (when == "before")


def test_a_weight_that_was_changed_in_between_keeps_the_change(linear):
    layer = tuner(linear)
    layer.merge()
    with torch.no_grad():
        linear.weight.add_(0.5)
    changed = linear.dequantize()
    with pytest.warns(UserWarning, match="has changed since an adapter was merged"):
        layer.unmerge()
    assert (linear.dequantize() - (changed - layer.delta)).norm() < 0.1 * changed.norm()


def test_a_merge_that_raises_leaves_the_weight_as_it_was(linear):
    layer = tuner(linear, Failing)
    before = state(linear)
    with pytest.raises(ArithmeticError, match="after the weight was written"):
        layer.merge()
    assert same(linear, before)


def test_an_unmerge_that_raises_leaves_the_weight_merged(linear):
    layer = tuner(linear, NeverUnmerged)
    layer.merge()
    merged = state(linear)
    with pytest.raises(NotImplementedError, match="cannot be unmerged"):
        layer.unmerge()
    assert same(linear, merged)


def test_an_unmerge_of_what_is_not_merged_is_the_layers_own(linear):
    layer = tuner(linear)
    before = linear.dequantize()
    layer.unmerge()
    assert (linear.dequantize() - (before - layer.delta)).norm() < 0.1 * linear.dequantize().norm()


def test_other_modules_and_other_layers_are_left_alone(linear):
    assert "merge" not in vars(tuner(nn.Linear(64, 32)))
    assert "merge" not in vars(NotATuner(linear))
    assert "merge" in vars(tuner(linear))


def test_a_layer_is_freed_with_its_last_reference(linear):
    layer = tuner(linear)
    layer.merge()
    gone = ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()
