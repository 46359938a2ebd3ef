"""map_tensors: what holds no tensor that changes stays the same object; what does keeps its type."""

import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from bigq.offload.containers import first_tensor, map_tensors

Pair = namedtuple("Pair", "first second")


class Tagged(list):
    """A list with attributes."""


class Strict(dict):
    """A dict that is not made from another."""

    def __init__(self, name):
        super().__init__()
        self.name = name


@dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    cache: list = field(default_factory=list)
    late: object = field(init=False, default=None)


def tagged(*items):
    made = Tagged(items)
    made.tag = "kept"
    return made


def strict(**items):
    made = Strict("kept")
    made.update(items)
    return made


X = torch.ones(2)
VALUES = {
    "tensor": X,
    "list": [X, 1],
    "list with attributes": tagged(X, "a"),
    "tuple": (X, (1, X)),
    "namedtuple": Pair(X, 2),
    "dict": {"x": X, "y": None},
    "OrderedDict": OrderedDict(x=X),
    "defaultdict": defaultdict(list, x=X),
    "own dict": strict(x=X),
    "UserDict": UserDict(x=X),
    "read-only mapping": types.MappingProxyType({"x": X}),
    "dataclass": Output(X, [X]),
    "torch's named results": torch.max(torch.ones(2, 3), dim=1),
    "nested": {"a": [Pair({"b": (X,)}, 1)]},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_nothing_is_touched_where_nothing_changes(value):
    assert map_tensors(lambda tensor: tensor, value) is value


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_container_with_a_changed_tensor_is_a_copy_of_its_type(value):
    changed = map_tensors(lambda tensor: tensor.double(), value)
    assert changed is not value
    assert type(changed) is type(value)
    assert first_tensor(changed).dtype == torch.float64
    assert first_tensor(value).dtype != torch.float64
    if hasattr(value, "__dict__"):
        assert vars(changed).keys() == vars(value).keys()


def test_what_else_a_copy_holds_is_the_same():
    cache, rest = [object()], strict(a=1)
    value = {"x": X, "cache": cache, "rest": rest}
    changed = map_tensors(torch.Tensor.double, value)
    assert changed["cache"] is cache
    assert changed["rest"] is rest
    assert map_tensors(torch.Tensor.double, defaultdict(list, x=X))["new"] == []
    assert map_tensors(torch.Tensor.double, VALUES["own dict"]).name == "kept"
    assert map_tensors(torch.Tensor.double, VALUES["list with attributes"]).tag == "kept"


def test_keys_that_are_skipped_stay_at_every_depth():
    value = {"past": [X], "inner": {"past": X, "x": X}}
    changed = map_tensors(torch.Tensor.double, value, skip_keys=("past",))
    assert changed["past"] is value["past"]
    assert changed["inner"]["past"] is X
    assert changed["inner"]["x"].dtype == torch.float64


def test_a_packed_sequence_keeps_its_sizes_on_the_cpu():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert map_tensors(lambda tensor: tensor, packed) is packed
    assert map_tensors(torch.Tensor.double, packed).data.dtype == torch.float64


@pytest.mark.parametrize(
    "value", [nn.Linear(2, 2), object(), "text", None, 3, Output], ids=lambda value: str(type(value))
)
def test_other_objects_are_left_alone(value):
    assert map_tensors(torch.Tensor.double, value) is value
    assert first_tensor(value) is None
