"""WatchedProducts: sees every product of a model with some of its weights, whichever module computes it.

A torch function mode is told of every torch function that runs. Those that multiply by a weight are listed here, and a
weight is known by its memory. So it does not matter whether a linear multiplies, or experts that index a stack of
matrices, or a module that reads the weight of another one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bigq.calibration.token_sample import Tokens, TokenSample
from bigq.system.internals import GROUPED_PRODUCTS

__all__ = ["Use", "WatchedProducts", "WatchedWeight"]

Function = Callable[..., Any]


class WatchedWeight(NamedTuple):
    """A weight by the name of its Parameter; `transposed` says that it is held as [..., K, N]."""

    name: str
    tensor: Tensor
    transposed: bool

    @property
    def matrix(self) -> Tensor:
        """The weight as [..., N, K]: a view."""
        tensor = self.tensor.detach()
        return tensor.mT if self.transposed else tensor


class Use(NamedTuple):
    """What the weight `name` does in a product.

    `kind`: "outputs" computes N numbers from K, "inputs" computes K numbers from N, and "rows" looks up rows of K
    numbers by their places among the N.
    """

    name: str
    kind: str


class _Product(NamedTuple):
    """inputs [..., R, A] times matrix [..., A, B].

    `is_left` says that the matrix stands on the left, so that the product is the transpose. `offsets` are the ends of
    the rows that belong to each matrix of a stack.
    """

    inputs: Tensor
    matrix: Tensor
    is_left: bool = False
    offsets: Tensor | None = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[_Product]:
    return [_Product(input, weight.mT)] if weight.dim() == 2 else []


def _matmul(input: Tensor, other: Tensor, **rest: Any) -> list[_Product]:
    found = [_Product(input, other)] if other.dim() == 2 or (input.dim() == other.dim() == 3) else []
    if input.dim() == other.dim() and input.dim() in (2, 3):  # w @ x = (x.T @ w.T).T
        found.append(_Product(other.mT, input.mT, is_left=True))
    return found


def _mm(input: Tensor, mat2: Tensor, **rest: Any) -> list[_Product]:
    return _matmul(input, mat2)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **rest: Any) -> list[_Product]:
    return [_Product(mat1, mat2)]


def _grouped_mm(input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, **rest: Any) -> list[_Product]:
    return [] if offs is None or (input.dim(), mat2.dim()) != (2, 3) else [_Product(input, mat2, offsets=offs)]


_PRODUCTS: dict[Function, Callable[..., list[_Product]]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _mm),
    Tensor.__rmatmul__: lambda weight, other: _matmul(other, weight),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys(GROUPED_PRODUCTS, _grouped_mm),
}
_LOOKUPS: dict[Function, Callable[..., tuple[Tensor, Tensor]]] = {
    F.embedding: lambda input, weight, *rest, **more: (input, weight),
    torch.embedding: lambda weight, indices, *rest, **more: (indices, weight),
}


class WatchedProducts(TorchFunctionMode):
    """Within `with`, samples the tokens that `weights` multiply.

    With `gradients`, outputs get hooks, through which a backward pass gives their gradients. An output that needs no
    gradient by itself begins the graph, so Parameters need none.

    Args:
        weights: of a model. Matrices, and stacks of matrices, are seen; weights of four dimensions or more are not.
        size: how many tokens are kept for each use of a weight.
        seed: of the choice of tokens.
        gradients: whether gradients are wanted.
    """

    def __init__(self, weights: Sequence[WatchedWeight], *, size: int, seed: int, gradients: bool) -> None:
        super().__init__()
        self.samples: dict[Use, TokenSample] = {}
        self.without_grad: dict[str, None] = {}  # names of weights that multiplied where torch records no graph
        self.mask: Tensor | None = None  # bool [B, T] on the CPU: which tokens of the batch are no padding
        self._size, self._gradients = size, gradients
        self._by_storage: dict[int, list[WatchedWeight]] = {}
        self._generators: dict[str, torch.Generator] = {}
        for place, weight in enumerate(weights):
            self._by_storage.setdefault(weight.tensor.untyped_storage().data_ptr(), []).append(weight)
            self._generators[weight.name] = torch.Generator("cpu").manual_seed(seed + place)

    def tokens(self) -> dict[Use, Tokens]:
        """What was sampled, by use."""
        return {use: sample.tokens(with_gradients=self._gradients) for use, sample in self.samples.items()}

    def compact(self) -> None:
        """Let go of what is not in the samples. Call it after the backward pass of each batch."""
        for sample in self.samples.values():
            sample.compact()

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        if func in _LOOKUPS:
            return self._looked_up(*_LOOKUPS[func](*args, **given), out)
        for product in _PRODUCTS[func](*args, **given) if func in _PRODUCTS else ():
            found = self._find(product.matrix)
            if found is not None:
                return self._multiplied(product, *found, out)
        return out

    def _find(self, matrix: Tensor) -> tuple[WatchedWeight, str, int] | None:
        """(weight, kind of its use, place in its stack) if `matrix` [..., A, B] is a weight, or one of a stack."""
        if type(matrix) not in (Tensor, nn.Parameter) or matrix.layout is not torch.strided or matrix.is_nested:
            return None
        for weight in self._by_storage.get(matrix.untyped_storage().data_ptr(), ()):
            stored = weight.matrix
            for kind, view in (("outputs", stored.mT), ("inputs", stored)):
                if (matrix.dtype, matrix.shape[-2:]) != (view.dtype, view.shape[-2:]):
                    continue
                if matrix.stride()[-2:] != view.stride()[-2:]:
                    continue
                offset = matrix.storage_offset() - view.storage_offset()
                if matrix.shape == view.shape and offset == 0:
                    return weight, kind, 0
                if matrix.dim() == 2 and view.dim() == 3 and offset % view.stride(0) == 0:
                    place = offset // view.stride(0)
                    if 0 <= place < len(view):
                        return weight, kind, place
        return None

    def _multiplied(self, product: _Product, weight: WatchedWeight, kind: str, place: int, out: Tensor) -> Tensor:
        """Sample the tokens of a product. Returns `out` with a hook."""
        inputs, width = product.inputs, product.matrix.shape[-1]
        flat = inputs.reshape(-1, inputs.shape[-1])
        rows, members = self._unpadded(inputs.shape[:-1]), None
        if product.offsets is not None:
            ends = product.offsets.to("cpu", torch.int64)
            rows = torch.arange(int(ends[-1]), device="cpu")  # those behind the last end belong to no matrix
            members = torch.bucketize(torch.arange(len(flat), device="cpu"), ends, right=True)
        elif product.matrix.dim() == 3:
            members = torch.arange(len(inputs), device="cpu").repeat_interleave(inputs.shape[-2])
        elif weight.tensor.dim() == 3:
            members = torch.full((len(flat),), place, dtype=torch.int64, device="cpu")
        add = self._sample(Use(weight.name, kind), weight).take(flat, width, rows=rows, members=members)
        if add is None:
            return self._hooked(weight, out, None)
        return self._hooked(weight, out, lambda g: add((g.mT if product.is_left else g).reshape(-1, width)))

    def _looked_up(self, ids: Tensor, table: Tensor, out: Tensor) -> Tensor:
        """Sample the ids of a lookup. Returns `out` with a hook."""
        found = self._find(table)
        if found is None or found[1] != "inputs" or found[0].tensor.dim() != 2:
            return out
        weight, width = found[0], table.shape[-1]
        rows = self._unpadded(ids.shape)
        add = self._sample(Use(weight.name, "rows"), weight).take(ids.reshape(-1), width, rows=rows)
        return self._hooked(weight, out, None if add is None else lambda g: add(g.reshape(-1, width)))

    def _sample(self, use: Use, weight: WatchedWeight) -> TokenSample:
        if use not in self.samples:
            stack = len(weight.tensor) if weight.tensor.dim() == 3 else 1
            self.samples[use] = TokenSample(self._size, self._generators[use.name], stack)
        return self.samples[use]

    def _unpadded(self, shape: torch.Size) -> Tensor | None:
        """The flat places of the tokens that are no padding, for activations of `shape` [B, T]; None: all."""
        return None if self.mask is None or self.mask.shape != shape else self.mask.flatten().nonzero().squeeze(1)

    def _hooked(self, weight: WatchedWeight, out: Tensor, add: Callable[[Tensor], None] | None) -> Tensor:
        if not self._gradients:
            return out
        if not torch.is_grad_enabled():
            self.without_grad[weight.name] = None
            return out
        if not out.requires_grad:
            out = out.detach().requires_grad_().clone()  # a clone, because models write to activations in place
        if add is not None:
            out.register_hook(add)  # type: ignore[no-untyped-call]
        return out
