"""own_names: torch's hooks on load_state_dict and what overrides it rename a checkpoint too."""

import sys
from contextlib import suppress
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import CheckpointError, QuantizationConfig, load_and_quantize_model
from interrupts import interrupted_at, points_of

NF4 = QuantizationConfig("nf4")


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.linear, self.middle, self.head = nn.Linear(32, 32), middle(), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.middle(self.linear(x)))


class Renaming(nn.Linear):
    """Knows older names of its tensors, and one of a buffer that it has no more."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for old, new in (("matrix", "weight"), ("offset", "bias")):
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        state_dict.pop(f"{prefix}mask", None)
        self.touched = True
        super()._load_from_state_dict(state_dict, prefix, *args)


class Hooked(nn.Linear):
    """The same by a hook; `public` by torch's public name of it."""

    def __init__(self, width, heads, public=False):
        super().__init__(width, heads)
        if public:
            self.register_load_state_dict_pre_hook(lambda module, *args: self.rename(*args))
        else:
            self._register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(state_dict, prefix, *args):
        for old, new in (("matrix", "weight"), ("offset", "bias")):
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        state_dict.pop(f"{prefix}mask", None)


class Exchanged(nn.Module):
    """Has two halves whose names an older version had the other way round."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self._register_load_state_dict_pre_hook(self.exchange)

    @staticmethod
    def exchange(state_dict, prefix, *args):
        for leaf in ("weight", "bias"):
            one, other = f"{prefix}first.{leaf}", f"{prefix}second.{leaf}"
            state_dict[one], state_dict[other] = state_dict[other], state_dict[one]

    def forward(self, x):
        return self.second(self.first(x).relu())


def assert_loads_as_torch_does(tmp_path, empty, middle, state):
    """bigq and load_state_dict make the same of `state`."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    plain, skeleton = Net(middle), empty(Net, middle=middle)
    plain.load_state_dict(state)
    before = {name: dict(vars(module)) for name, module in skeleton.named_modules()}
    model = load_and_quantize_model(skeleton, tmp_path, NF4, "cpu")
    expected = load_and_quantize_model(plain, None, NF4, "cpu")
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert "touched" not in vars(model.middle)
    assert before["middle"].keys() >= {"_parameters"}
    return model


@pytest.mark.parametrize("middle", [lambda: Renaming(32, 32), lambda: Hooked(32, 32), lambda: Hooked(32, 32, True)])
def test_old_names_of_a_module(tmp_path, empty, middle):
    state = Net(middle).state_dict()
    names = {"middle.weight": "middle.matrix", "middle.bias": "middle.offset"}
    old = {names.get(name, name): tensor for name, tensor in state.items()}
    assert_loads_as_torch_does(tmp_path, empty, middle, {**old, "middle.mask": torch.ones(3)})


def test_an_interrupt_leaves_no_trace_of_code_that_was_run_for_its_names(tmp_path, empty, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # one in a __del__ is swallowed

    def middle():
        return Renaming(32, 32)

    def load(model):
        load_and_quantize_model(model, tmp_path, NF4, "cpu", progress=False)

    state = Net(middle).state_dict()
    state["middle.matrix"] = state.pop("middle.weight")
    save_file(state, tmp_path / "model.safetensors")
    load(empty(Net, middle=middle))
    points = points_of(partial(load, empty(Net, middle=middle)), ("model/own_names", "model/transaction"))
    assert len(points) > 20
    for point in points:
        model = empty(Net, middle=middle)
        with suppress(KeyboardInterrupt):
            interrupted_at(point, partial(load, model))
        assert "touched" not in vars(model.middle), str(point)


def test_names_that_are_exchanged(tmp_path, empty):
    assert_loads_as_torch_does(tmp_path, empty, Exchanged, Net(Exchanged).state_dict())


def test_weight_norm_of_old_and_of_new_torch(tmp_path, empty):
    def middle(norm):
        return lambda: norm(nn.Linear(32, 32))

    old, new = middle(nn.utils.weight_norm), middle(nn.utils.parametrizations.weight_norm)
    with pytest.warns(FutureWarning, match="weight_norm"):
        state = Net(old).state_dict()
    model = assert_loads_as_torch_does(tmp_path, empty, new, state)
    assert torch.equal(model.middle.parametrizations.weight.original1, state["middle.weight_v"])
    save_file(Net(new).state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(FutureWarning, match="weight_norm"):
        back = load_and_quantize_model(empty(Net, middle=old), tmp_path, NF4, "cpu")
    assert back.middle.weight_v.isfinite().all()


@pytest.mark.parametrize("middle", [lambda: nn.LayerNorm(32), lambda: nn.Sequential(nn.LayerNorm(32))])
def test_gamma_and_beta(tmp_path, empty, middle):
    state = Net(middle).state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    old = {
        name.replace("weight", "gamma").replace("bias", "beta") if "middle" in name else name: tensor
        for name, tensor in state.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    model = load_and_quantize_model(empty(Net, middle=middle), tmp_path, NF4, "cpu")
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items() if n.startswith("middle"))


def test_a_gamma_of_the_models_own_stays_one(tmp_path, empty):
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(32, 32)
            self.gamma = nn.Parameter(torch.randn(32))

    state = Net(Scaled).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    model = load_and_quantize_model(empty(Net, middle=Scaled), tmp_path, NF4, "cpu")
    assert torch.equal(model.middle.gamma, state["middle.gamma"])


def test_what_is_computed_is_no_name(tmp_path, empty):
    class Splitting(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self._register_load_state_dict_pre_hook(self.split)

        @staticmethod
        def split(state_dict, prefix, *args):
            halves = state_dict.pop(f"{prefix}both").chunk(2)
            state_dict[f"{prefix}one.weight"], state_dict[f"{prefix}two.weight"] = halves

    state = {name: tensor for name, tensor in Net(Splitting).state_dict().items() if "middle" not in name}
    save_file({**state, "middle.both": torch.zeros(64, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)middle\.one\.weight: expected.*middle\.both in .*: found \[64, 32\]"
    ):
        load_and_quantize_model(empty(Net, middle=Splitting), tmp_path, NF4, "cpu")


def test_code_that_needs_numbers_is_not_asked_for_names(tmp_path, empty):
    class Reading(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            assert float(state_dict[f"{prefix}weight"].sum()) > 0
            super()._load_from_state_dict(state_dict, prefix, *args)

    def middle():
        return Reading(32, 32)

    state = Net(middle).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"Reading at 'middle\.' does not load tensors on meta"):
        model = load_and_quantize_model(empty(Net, middle=middle), tmp_path, NF4, "cpu")
    assert torch.equal(model.middle.bias, state["middle.bias"])
