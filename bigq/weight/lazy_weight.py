"""LazyWeight: a tensor that is decoded when its numbers are read: a quantized weight, its views and its copies."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigq.errors import ConfigError, UnsupportedError
from bigq.ops.sharding import is_sharded, local_part
from bigq.system.internals import SEES_EDITS, version_of, wrapper
from bigq.weight.stored import Stored

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LazyWeight", "plain"]


class LazyWeight(Tensor):
    """A quantized weight, a view of one, or a copy that is not decoded yet. `QuantizedWeight` adds torch's functions.

    Attributes:
        root: how the weight is stored. None for a view, which asks its `base`, and for a copy that has `numbers`.
        assign: writes a float tensor or a LazyWeight to the tensors of a module: QuantizedModule.write_weight of one
            leaf. None for views, and for copies, whose changes do not reach the module.
        base: of a view, the weight that it is a view of.
        view_of_base: of a view, the function from the numbers of the base to its own.
        operand_of_base: of a view, the function from how the base is stored to how the view is; it returns None if no
            format stores the view.
        numbers: of a copy that was changed in place, its decoded numbers.
        versions: of a copy that shares its tensors with a module, the versions of these tensors when it was made.
    """

    root: Stored | None = None
    assign: Callable[..., None] | None = None
    base: "LazyWeight | None" = None
    view_of_base: Callable[[Tensor], Tensor]
    operand_of_base: Callable[[Stored], Stored | None]
    numbers: Tensor | None = None
    versions: list[tuple[int, int, int]] | None = None

    @staticmethod
    def __new__(
        cls,
        shape: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
        strides: Iterable[int] | None = None,
        **attributes: Any,
    ) -> "Self":
        weight: Self = wrapper(cls, tuple(shape), None if strides is None else tuple(strides), dtype, device)
        vars(weight).update(attributes)
        return weight

    @classmethod
    def of(cls, stored: Stored, dtype: torch.dtype, assign: Callable[..., None]) -> "Self":
        """Make the weight that a module holds as `stored`."""
        return cls(stored.weight_shape, dtype, stored.state["packed"].device, root=stored, assign=assign)

    # Reading

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode to a new plain tensor in `dtype` (None: the dtype of the weight)."""
        dtype = dtype or self.dtype
        if self.numbers is not None:
            return self.numbers.to(dtype, copy=True)
        operand = self.operand()
        if operand is None:
            assert self.base is not None
            return self.view_of_base(self.base.dequantize(dtype))
        dense = operand.dequantize(dtype)
        if dense.stride() == self.stride():
            return dense
        if is_sharded(dense):  # torch makes no DTensor of given strides
            return dense.contiguous()
        return torch.empty_strided(self.shape, self.stride(), dtype=dtype, device=dense.device).copy_(dense)

    def operand(self) -> Stored | None:
        """How this weight is stored, so that products can use the format's kernels; None if no format stores it.

        Raises:
            UnsupportedError: this is a copy, and the original weight has changed since.
        """
        if self.base is not None:
            stored = self.base.operand()
            return None if stored is None else self.operand_of_base(stored)
        if self.root is not None and self.versions is not None and self.versions != _versions(self.root):
            raise UnsupportedError(
                "a copy of a quantized weight, made by .to() and not decoded then, is read after the weight has "
                "changed: call weight.dequantize() where a copy is meant to last"
            )
        return self.root

    @property
    def is_copy(self) -> bool:
        """Whether this is a copy, or a view of a copy, that still shares the tensors of a module."""
        return self.versions is not None if self.base is None else self.base.is_copy

    def copy_as(self, dtype: torch.dtype, device: torch.device) -> "Self":
        """Make a copy in another dtype or on another device. It is decoded when its numbers are read."""
        operand = self.operand()
        if operand is None:
            return type(self)(self.shape, dtype, device, numbers=self.dequantize().to(device).to(dtype))
        if device == self.device and SEES_EDITS:
            return type(self)(self.shape, dtype, device, root=operand, versions=_versions(operand))
        moved = replace(operand, state={part: t.detach().to(device, copy=True) for part, t in operand.state.items()})
        return type(self)(self.shape, dtype, device, root=moved)

    # Views: writing to one writes to the weight

    def swapped(self) -> "Self":
        """Make the view with the last two dimensions swapped."""
        return self.viewed(lambda dense: dense.mT, lambda stored: replace(stored, transposed=not stored.transposed))

    def part(self, index: int | slice) -> "Self":
        """Make the view of an entry, or of a range, of the first dimension."""
        if isinstance(index, int) and self.dim() < 3:  # a row of a matrix, of which only this row is decoded
            row = range(self.shape[0])[index]
            return self.part(slice(row, row + 1)).viewed(lambda dense: dense[0])
        return self.viewed(lambda dense: dense[index], lambda stored: stored.select(index))

    def viewed(
        self,
        view_of_base: Callable[[Tensor], Tensor],
        operand_of_base: Callable[[Stored], Stored | None] = lambda stored: None,
    ) -> "Self":
        """Make the view whose numbers are `view_of_base` of the numbers of this weight."""
        like = view_of_base(torch.empty_strided(self.shape, self.stride(), device="meta"))
        return type(self)(
            like.shape,
            self.dtype,
            self.device,
            like.stride(),
            base=self,
            view_of_base=view_of_base,
            operand_of_base=operand_of_base,
        )

    # Writing

    def write(self, value: Tensor) -> None:
        """Replace the numbers by `value`: quantize it into the tensors that hold this weight.

        Raises:
            ConfigError: `value` has another shape, is not floating point, or holds NaN or Inf.
            UnsupportedError: this is a view of a sharded weight. A view of a DTensor may be a copy.
        """
        if value.shape != self.shape:
            raise ConfigError(
                f"a quantized weight of shape {list(self.shape)} is given a tensor of shape {list(value.shape)}"
            )
        if self.base is not None and self._is_sharded():
            raise UnsupportedError(
                "a part or a view of a sharded quantized weight is written: write to the whole weight, or before the "
                "model is sharded"
            )
        with torch.no_grad():
            if torch.equal(plain(value), self.dequantize(value.dtype)):
                return  # quantizing the same numbers again could change their last bits
            if self.assign is not None:
                self.assign(value)
            elif self.base is None:
                self.numbers, self.root = plain(value).detach().to(self.device, self.dtype, copy=True), None
            elif not self._write_rows(plain(value)):
                whole = self.base.dequantize(torch.float32)
                self.view_of_base(whole).copy_(value)
                self.base.write(whole)

    def set_data(self, value: Tensor) -> None:
        """`weight.data = value`: like `write`, but a module's weight takes over the dtype and the device of `value`."""
        if self.assign is not None:
            self.assign(value, follows=True)
        else:
            self.write(value)

    def _is_sharded(self) -> bool:
        if self.base is not None:
            return self.base._is_sharded()
        return self.root is not None and is_sharded(self.root.state["packed"])

    def _write_rows(self, value: Tensor) -> bool:
        """Quantize `value` into rows whose state is a view of a module's tensors; returns whether this is the case."""
        assert self.base is not None
        operand, whole = self.operand(), self.base.operand()
        if self.base.assign is None or operand is None or whole is None or operand.format != whole.format:
            return False
        for part, tensor in operand.quantize(value).items():
            operand.state[part].copy_(tensor)
        return True


def plain(value: Any) -> Any:
    """Return `value`, dequantized if it is a LazyWeight."""
    return value.dequantize() if isinstance(value, LazyWeight) else value


def _versions(stored: Stored) -> list[tuple[int, int, int]]:
    """Version counters and address of each tensor: they change if the tensor does.

    torch counts a write to a DTensor at the DTensor, and one to its local tensor at that one.
    """
    return [
        (version_of(tensor), version_of(own), 0 if own.is_meta else own.data_ptr())
        for tensor, own in ((tensor, local_part(tensor)) for tensor in stored.state.values())
    ]
