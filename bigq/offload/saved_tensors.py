"""saved_offloaded: autograd saves the offloaded tensor, not its copy on the device, which the next block overwrites.

The backward pass fetches it again. So memory stays flat however many blocks a graph goes through.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bigq.offload.transfer import Layout, Transfer
from bigq.system.internals import saved_tensor_hooks, version_of

__all__ = ["saved_offloaded"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Offloaded:
    """A view of a copy: `own` is the offloaded tensor that was copied, `offset` the first byte of the view in it."""

    own: Tensor
    version: int
    offset: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Packed:
    """Any other tensor, as the hooks around ours packed it."""

    value: Any
    unpack: Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class _Kept:
    """Any other tensor, detached: a saved output that knew its graph would keep it alive for good."""

    tensor: Tensor
    version: int


def saved_offloaded(buffer: Tensor, layout: Layout, transfer: Transfer) -> saved_tensors_hooks:
    """A context in which autograd saves the offloaded tensors of `layout` in place of their copies in `buffer`.

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
        return _Offloaded(
            own=own,
            version=version_of(own),
            offset=position - start,
            dtype=tensor.dtype,
            size=tensor.size(),
            stride=tensor.stride(),
        )

    def unpack(saved: _Offloaded | _Packed | _Kept) -> Tensor:
        if isinstance(saved, _Packed):
            return saved.unpack(saved.value)
        if isinstance(saved, _Offloaded):
            _refuse_edit(saved.own, saved.version)
            return _fetch(saved, transfer)
        _refuse_edit(saved.tensor, saved.version)
        return saved.tensor

    return saved_tensors_hooks(pack, unpack)


def _fetch(saved: _Offloaded, transfer: Transfer) -> Tensor:
    own, layout = saved.own, Layout([saved.own])
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=transfer.device)
    stream = torch.cuda.current_stream(transfer.device) if transfer.device.type == "cuda" else None
    reads = transfer.start(layout, buffer, stream)
    for read in reads:
        read.wait()
    for read in reads:
        read.raise_error()
    whole = buffer[layout.starts[0] : layout.starts[0] + own.nbytes].view(saved.dtype)
    return whole.as_strided(saved.size, saved.stride, saved.offset // saved.dtype.itemsize)


def _refuse_edit(tensor: Tensor, version: int) -> None:
    """What torch checks where there are no hooks."""
    if version_of(tensor) != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass of an offloaded block needs was modified "
            f"in place after the forward pass: it is at version {version_of(tensor)}, expected version {version}"
        )
