"""saved_at_rest: what autograd saves of a lent tensor is where it rests, not a copy that the next block overwrites.

The backward pass fetches it again. So memory stays flat however many blocks a graph goes through.
"""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigq.offload.transfer import Layout, Transfer
from bigq.system.internals import saved_tensor_hooks, version_of

__all__ = ["saved_at_rest"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _AtRest:
    """A view of a lent tensor: `own` is that tensor at rest, `offset` the first byte of the view in it."""

    own: Tensor
    version: int
    offset: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Packed:
    """A tensor that was not lent, as the hooks around ours packed it."""

    value: Any
    unpack: Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class _Kept:
    """A tensor that was not lent, detached: a saved output that knew its graph would keep it alive for good."""

    tensor: Tensor
    version: int


def saved_at_rest(buffer: Tensor, layout: Layout, transfer: Transfer) -> AbstractContextManager[object]:
    """A context in which autograd saves views of `buffer`, which holds the copies of `layout`, as where they rest.

    Other tensors go to the hooks that are in force already, such as those of activation checkpointing.
    """
    storage = buffer.untyped_storage()
    starts = sorted((start, index) for index, start in enumerate(layout.starts) if layout.tensors[index].numel())
    outer = saved_tensor_hooks()

    def pack(tensor: Tensor) -> object:
        if tensor.layout != torch.strided or tensor.untyped_storage() is not storage:
            return (
                _Packed(outer[0](tensor), outer[1]) if outer is not None else _Kept(tensor.detach(), version_of(tensor))
            )
        position = int(tensor.storage_offset()) * tensor.element_size()
        start, index = starts[bisect_right(starts, (position, len(layout.tensors))) - 1]
        own = layout.tensors[index]
        return _AtRest(
            own=own,
            version=version_of(own),
            offset=position - start,
            dtype=tensor.dtype,
            size=tensor.size(),
            stride=tensor.stride(),
        )

    def unpack(saved: _AtRest | _Packed | _Kept) -> Tensor:
        if isinstance(saved, _Packed):
            return saved.unpack(saved.value)
        if isinstance(saved, _AtRest):
            _refuse_edit(saved.own, saved.version)
            return _fetch(saved, transfer)
        _refuse_edit(saved.tensor, saved.version)
        return saved.tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _fetch(saved: _AtRest, transfer: Transfer) -> Tensor:
    own, layout = saved.own, Layout([saved.own])
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=transfer.device)
    stream = torch.cuda.current_stream(transfer.device) if transfer.device.type == "cuda" else None
    for read in transfer.start(layout, buffer, stream):
        read.result()
    whole = buffer[layout.starts[0] : layout.starts[0] + own.nbytes].view(saved.dtype)
    return whole.as_strided(saved.size, saved.stride, saved.offset // saved.dtype.itemsize)


def _refuse_edit(tensor: Tensor, version: int) -> None:
    """What torch checks where there are no hooks."""
    if version_of(tensor) != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass of an offloaded block needs was modified "
            f"in place after the forward pass: it is at version {version_of(tensor)}, expected version {version}"
        )
