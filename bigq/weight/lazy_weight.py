"""LazyWeight: a quantized weight whose numbers are decoded when they are read: its views, its copies, writing to it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigq.errors import ConfigError, UnsupportedError
from bigq.system.internals import SEES_EDITS, version_of, wrapper
from bigq.weight.stored import Stored

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LazyWeight", "plain"]


class LazyWeight(Tensor):
    """A quantized weight, a view of one, or a copy that was not decoded yet; `QuantizedWeight` adds torch's functions.

    Attributes:
        root: how the weight is stored; None for a view, which asks its base, and for a copy that has numbers.
        assign: writes other numbers, a float tensor or a LazyWeight, to the tensors of a module:
            QuantizedModule.write_weight of one leaf. None for views and copies; changes of a copy are its own.
        base, view_of_base, operand_of_base: of a view the weight it is a view of, and the functions that give its
            numbers from the base's, and how it is stored from how the base is (None where no format stores it).
        numbers: those of a copy that was changed in place.
        versions: of a copy that shares its tensors with a module, what they were when it was made.
    """

    root: Stored | None = None
    assign: Callable[..., None] | None = None
    base: "LazyWeight | None" = None
    view_of_base: Callable[[Tensor], Tensor]
    operand_of_base: Callable[[Stored], Stored | None]
    numbers: Tensor | None = None
    versions: list[tuple[int, int]] | None = None

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
        """The weight that a module holds as `stored`."""
        return cls(stored.weight_shape, dtype, stored.state["packed"].device, root=stored, assign=assign)

    # Reading

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers as a plain tensor of their own, in `dtype` (by default that of the weight)."""
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
        return torch.empty_strided(self.shape, self.stride(), dtype=dtype, device=dense.device).copy_(dense)

    def operand(self) -> Stored | None:
        """How these numbers are stored, if a format stores them: products need no dequantized weight then.

        Raises:
            UnsupportedError: this is a copy, and the weight it was made from has changed since.
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
        """Whether this is a copy, or a view of one, that still shares the tensors of a module."""
        return self.versions is not None if self.base is None else self.base.is_copy

    def copy_as(self, dtype: torch.dtype, device: torch.device) -> "Self":
        """A copy in another dtype or on another device, not decoded until that is needed."""
        operand = self.operand()
        if operand is None:
            return type(self)(self.shape, dtype, device, numbers=self.dequantize().to(device).to(dtype))
        if device == self.device and SEES_EDITS:
            return type(self)(self.shape, dtype, device, root=operand, versions=_versions(operand))
        moved = replace(operand, state={part: t.detach().to(device, copy=True) for part, t in operand.state.items()})
        return type(self)(self.shape, dtype, device, root=moved)

    # Views, which are written through

    def swapped(self) -> "Self":
        """The view with the last two dimensions swapped."""
        return self.viewed(lambda dense: dense.mT, lambda stored: replace(stored, transposed=not stored.transposed))

    def part(self, index: int | slice) -> "Self":
        """The view of an entry, or of a range, of the first dimension."""
        if isinstance(index, int) and self.dim() < 3:  # a row: it is decoded alone too
            row = range(self.shape[0])[index]
            return self.part(slice(row, row + 1)).viewed(lambda dense: dense[0])
        return self.viewed(lambda dense: dense[index], lambda stored: stored.select(index))

    def viewed(
        self,
        view_of_base: Callable[[Tensor], Tensor],
        operand_of_base: Callable[[Stored], Stored | None] = lambda stored: None,
    ) -> "Self":
        """The view whose numbers `view_of_base` gives from these."""
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
        """Make `value` the numbers of this weight: quantize it into the tensors that hold them.

        Raises:
            ConfigError: `value` has another shape, is not floating point, or holds NaN or Inf.
        """
        if value.shape != self.shape:
            raise ConfigError(
                f"a quantized weight of shape {list(self.shape)} is given a tensor of shape {list(value.shape)}"
            )
        with torch.no_grad():
            if torch.equal(plain(value), self.dequantize(value.dtype)):
                return  # to quantize the same numbers again may change their last bits
            if self.assign is not None:
                self.assign(value)
            elif self.base is None:
                self.numbers, self.root = plain(value).detach().to(self.device, self.dtype, copy=True), None
            elif not self._write_rows(plain(value)):
                whole = self.base.dequantize(torch.float32)
                self.view_of_base(whole).copy_(value)
                self.base.write(whole)

    def set_data(self, value: Tensor) -> None:
        """`weight.data = value`: as `write`, but a module's weight takes the dtype and the device of `value`."""
        if self.assign is not None:
            self.assign(value, follows=True)
        else:
            self.write(value)

    def _write_rows(self, value: Tensor) -> bool:
        """Write to whole rows of a module's weight alone, where they are views of its tensors; whether they were."""
        assert self.base is not None
        operand, whole = self.operand(), self.base.operand()
        if self.base.assign is None or operand is None or whole is None or operand.format != whole.format:
            return False
        for part, tensor in operand.quantize(value).items():
            operand.state[part].copy_(tensor)
        return True


def plain(value: Any) -> Any:
    """`value`, dequantized if it is a LazyWeight."""
    return value.dequantize() if isinstance(value, LazyWeight) else value


def _versions(stored: Stored) -> list[tuple[int, int]]:
    """What changes when the tensors do: edits that torch sees, and their addresses."""
    return [(version_of(tensor), 0 if tensor.is_meta else tensor.data_ptr()) for tensor in stored.state.values()]
