"""The state dict in a pickle: the one dict of weights, wherever a training script has put it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bigq.errors import CheckpointError
from bigq.system.internals import EXTRA_STATE
from bigq.system.text import shortlist

__all__ = ["EXTRA_STATE", "StateDict", "find_state_dict"]

_DEPTH = 2  # dicts deep that a state dict is looked for


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """`tensors` by name, found under `keys` of the pickle; `others` says what it holds beside them.

    `extra_states` are objects other than tensors that modules have put there, by name.
    """

    keys: tuple[str, ...]
    tensors: dict[str, Tensor]
    extra_states: dict[str, object]
    others: tuple[str, ...]


def find_state_dict(path: Path, content: object) -> StateDict:
    """The state dict that `content`, the pickle at `path`, is or holds.

    Raises:
        CheckpointError: there is none, there are several, or it holds tensors without plain numbers.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of names and tensors")
    found = dict(_candidates(content, ()))
    if len(found) > 1:
        named = [" ".join(map(repr, keys)) or "its top level" for keys in found]
        example = "".join(f"[{key!r}]" for key in next(filter(None, found)))
        raise CheckpointError(
            f"{path} is not a flat state dict, its tensors are under {shortlist(named)}: extract one with "
            f"torch.save(torch.load({str(path)!r}, weights_only=True){example}, 'state_dict.pt')"
        )
    keys, entries = next(iter(found.items()), ((), content))
    tensors = {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}
    problems = [problem for name, tensor in tensors.items() if (problem := _refusal(name, tensor))]
    if problems:
        raise CheckpointError(f"{path} is not a dict of names and dense tensors: {shortlist(problems)}")
    rest = {name: value for name, value in entries.items() if name not in tensors}
    extra = {name: rest.pop(name) for name in list(rest) if isinstance(name, str) and _is_extra_state(name)}
    return StateDict(
        keys=keys,
        tensors={name: tensor.detach() for name, tensor in tensors.items()},
        extra_states=extra,
        others=tuple(_other(name, value) for name, value in rest.items()),
    )


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == EXTRA_STATE


def _candidates(
    content: dict[object, object], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[object, object]]]:
    """The dicts in `content`, itself included, that hold weights by name.

    What an optimizer holds is deeper, or has numbers for names; losses have no dimension, states of generators no
    fraction.
    """
    if any(isinstance(name, str) and _is_weight(value) for name, value in content.items()):
        yield keys, content
    if len(keys) < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict):
                yield from _candidates(value, (*keys, key))


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and (value.is_floating_point() or value.is_complex())


def _other(name: object, value: object) -> str:
    if not isinstance(name, str):
        return f"a key is a {type(name).__name__}, not a name"  # a tuple of 200 bytes may have a repr of 42 MB
    return f"{name!r} is a {type(value).__name__}, not a tensor"


def _refusal(name: str, tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"{name!r} is a {type(tensor).__name__}, not a plain tensor"
    if tensor.is_quantized:
        return f"{name!r} is quantized by torch ({tensor.dtype}), dequantize it first"
    if tensor.is_nested or tensor.layout not in (torch.strided, torch.sparse_coo, torch.sparse_csr):
        return f"{name!r} is sparse or nested ({tensor.layout}), call to_dense() first"
    if tensor.device.type != "cpu":
        return f"{name!r} was saved without data, from the {tensor.device.type} device"
    return None
