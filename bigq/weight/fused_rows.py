"""FusedRows: the rows of several linears as one weight, which a single launch multiplies by the input that they share.

The Parameters of the linears stay what they are, and lie one behind the other in memory. The first linear that is
called computes the product for all, and each of the others takes its columns of it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.utils.dlpack import from_dlpack

from bigq.formats import Product
from bigq.system.internals import SEES_EDITS, something_transforms, version_of
from bigq.weight.stored import multiply, result_dtype

__all__ = ["ALIGNMENT", "MAX_TOKENS", "TELLS_EXPORT", "FusedPart", "FusedRows"]

ALIGNMENT = 16  # bytes, which the kernels load at once
# Above, other kernels compute a small weight than a large one, so bits would change. One launch would still be faster:
# 22 us instead of 35 for q, k and v of an 8B model at 32 tokens, 33 instead of 48 at 128 (H200, CUDA graph).
MAX_TOKENS = 16
# Before torch 2.13 all code that torch.compile traces is told that it is exported, as code in a strict export is.
TELLS_EXPORT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


State = tuple[Tensor | None, ...]  # what `product.parts` names


class _Held(NamedTuple):
    """The product of the first linear's call, and all that has to be the same when another linear takes its part."""

    x: Tensor
    edits: tuple[int, ...]  # of x and of all Parameters
    moment: tuple[Any, ...]
    parts: list[Tensor | None]  # each is given away once, because who gets it may write to it


class FusedRows:
    """Several weights [N_i, K] in one piece of memory, one behind the other.

    Args:
        sizes: N_i.
        product: how the format of all of them multiplies.
        compute_dtype: of the products.
        parameters: of each linear, what `product.parts` names. They are given new memory: rows of one tensor, each part
            with a storage of its own, because libraries that save a model keep one of several tensors that share one.
    """

    def __init__(
        self,
        sizes: list[int],
        product: Product,
        compute_dtype: torch.dtype | None,
        parameters: Sequence[State],
    ) -> None:
        self.sizes = sizes
        self.product = product
        self.compute_dtype = compute_dtype
        self.parameters = parameters
        # Parameters, because a graph of torch.compile copies other tensors to memory of its own in each call.
        self.whole: State = tuple(_join([own[place] for own in parameters]) for place in range(len(product.parts)))
        self.addresses = [_addresses(own) for own in parameters]
        self.held: _Held | None = None

    def compute(self, x: Tensor, whole: State) -> list[Tensor | None]:
        """The products of x [..., K] with all weights, `self.whole`: [..., N_i] each, contiguous."""
        out = multiply(x, self.product, whole, self.compute_dtype)
        # One row is cut into views. torch.split_with_sizes_copy would be one launch for several, but when a CUDA graph
        # is replayed, it would read addresses from host memory that has been given back.
        return [part.contiguous() for part in torch.split(out, self.sizes, dim=-1)]

    def release(self) -> None:
        """Let go of the memory, because a linear has other Parameters now: from here on each computes by itself."""
        self.held = None
        self.whole = ()


class FusedPart:
    """What a linear of `FusedRows` asks at each call. A copy of the linear, or one that is unpickled, has None."""

    def __init__(self, rows: FusedRows, index: int) -> None:
        self.rows = rows
        self.index = index
        self.parameters = rows.parameters[index]
        self.is_last = index == len(rows.parameters) - 1

    def __call__(self, tensors: State, x: Tensor) -> Tensor | None:
        """The product of x [..., K] with the linear's weight; None where the linear has to compute it by itself.

        Args:
            tensors: the Parameters of the linear as they are now.
            x: its input.
        """
        if type(x) is not Tensor or x.is_nested or x.dim() == 0 or not 0 < x.numel() <= MAX_TOKENS * x.shape[-1]:
            return None
        if torch.is_grad_enabled():  # a gradient through parts of one tensor would be padded with zeros, and summed
            return None
        return self._traced(tensors, x) if is_compiling() else self._eager(tensors, x)

    def is_intact(self, tensors: State) -> bool:
        """Whether `tensors`, the Parameters of the linear now, are those that were fused."""
        return self._are_same(tensors) and _addresses(tensors) == self.rows.addresses[self.index]

    def _are_same(self, tensors: State) -> bool:
        return all(tensor is own for tensor, own in zip(tensors, self.parameters, strict=True))

    def _eager(self, tensors: State, x: Tensor) -> Tensor | None:
        rows, whole = self.rows, self.rows.whole
        if not (whole and SEES_EDITS) or something_transforms():
            return None
        if not self.is_intact(tensors):
            rows.release()
            return None
        edits = (version_of(x), *[version_of(t) for own in rows.parameters for t in own if t is not None])
        moment = (*result_dtype(x), *_stream(x))
        if self.index == 0:
            rows.held = _Held(x, edits, moment, rows.compute(x, whole))
        held = rows.held
        if held is None or held.x is not x or held.edits != edits or held.moment != moment:
            return None
        return self._taken(held)

    def _traced(self, tensors: State, x: Tensor) -> Tensor | None:
        """In a graph of torch.compile nothing tells whether x was written to between two calls."""
        rows, whole = self.rows, self.rows.whole
        is_exported = is_exporting() if TELLS_EXPORT else not is_dynamo_compiling()
        is_one = x.numel() == x.shape[-1]  # compiled code of several tokens has not been measured
        if not (whole and is_one) or is_exported or not self._are_same(tensors):
            return None
        if self.index == 0:
            rows.held = _Held(x, (), (), rows.compute(x, whole))
        held = rows.held
        if held is None or held.x is not x:
            return None
        return self._taken(held)

    def _taken(self, held: _Held) -> Tensor | None:
        part, held.parts[self.index] = held.parts[self.index], None
        if self.is_last:
            self.rows.held = None
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """What stands for a FusedPart in a copy of its linear, whose Parameters have memory of their own."""


def _join(parts: Sequence[Tensor | None]) -> nn.Parameter | None:
    """One tensor with the rows of `parts`, which become views of it; None if there are none."""
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    whole = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, rows in zip(tensors, torch.split(whole, [len(tensor) for tensor in tensors]), strict=True):
        tensor.data = from_dlpack(rows)
    return nn.Parameter(whole, requires_grad=False)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _stream(x: Tensor) -> tuple[Any, ...]:
    """Where work is put now: what is computed on one stream, or recorded in a graph, is not ready on another."""
    if not x.is_cuda:
        return ()
    return torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()
