"""TokenSample: some of the tokens that a weight multiplied, with the gradients of what it computed from them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenSample", "Tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Sampled tokens of one use of a weight, on the CPU.

    Args:
        inputs: [T, A], what the weight multiplied; int64 [T] if rows of the weight were looked up by their numbers.
        gradients: [T, B], the gradients of the outputs; None if no gradient was asked for.
        members: int64 [T], which matrix of a stack multiplied the token; None for a weight that is one matrix.
        seen: int64 [E], how many tokens each matrix of the stack multiplied in all; [1] for one matrix.
    """

    inputs: Tensor
    gradients: Tensor | None
    members: Tensor | None
    seen: Tensor

    def of(self, member: int) -> tuple[Tensor, Tensor | None]:
        """(inputs, gradients) of the tokens of one matrix."""
        if self.members is None:
            return self.inputs, self.gradients
        own = self.members == member
        return self.inputs[own], None if self.gradients is None else self.gradients[own]


@dataclass(kw_only=True, eq=False)
class _Call:
    """The tokens that were taken from one call, by their random keys. Their gradients come later, or never."""

    keys: Tensor
    inputs: Tensor
    members: Tensor | None
    gradients: Tensor | None = None


class TokenSample:
    """At most `size` of the tokens of all calls, each as likely as any other: those with the smallest random keys.

    Inputs are copied to the CPU when they come, and gradients when the backward pass reaches them. So the device of the
    model holds none of them.

    Args:
        size: how many tokens are kept.
        generator: of the keys, on the CPU.
        stack: how many matrices the weight is.
    """

    def __init__(self, size: int, generator: torch.Generator, stack: int = 1) -> None:
        self._size, self._generator = size, generator
        self._calls: list[_Call] = []
        self._keys = torch.zeros(0, dtype=torch.float64, device="cpu")  # of the sample, in ascending order
        self._seen = torch.zeros(stack, dtype=torch.int64, device="cpu")
        self._width = 0

    def take(
        self, inputs: Tensor, width: int, *, rows: Tensor | None = None, members: Tensor | None = None
    ) -> Callable[[Tensor], None] | None:
        """Take tokens of one call.

        Args:
            inputs: [R, A], or the row numbers [R] of a lookup.
            width: of the outputs.
            rows: int64 on the CPU, those of the R that are tokens; None: all of them.
            members: int64 [R] on the CPU, the matrix of the stack that multiplies each; None for one matrix.

        Returns:
            what to call with the gradients [R, width] of the outputs; None if no token was taken.
        """
        rows = torch.arange(len(inputs), device="cpu") if rows is None else rows
        of_stack = torch.zeros_like(rows) if members is None else members[rows]
        self._seen += torch.bincount(of_stack, minlength=len(self._seen))
        self._width = width
        keys = torch.rand(len(rows), dtype=torch.float64, generator=self._generator, device="cpu")
        largest = float(self._keys[-1]) if len(self._keys) == self._size else 1.0
        chosen = (keys < largest).nonzero().squeeze(1)
        if len(chosen) > self._size:
            chosen = keys.topk(self._size, largest=False).indices.sort().values
        if not len(chosen):
            return None
        self._keys = torch.cat([self._keys, keys[chosen]]).sort().values[: self._size]
        there = rows[chosen].to(inputs.device)
        call = _Call(
            keys=keys[chosen],
            inputs=inputs.detach().index_select(0, there).cpu(),
            members=None if members is None else of_stack[chosen],
        )
        self._calls.append(call)

        def add(gradients: Tensor) -> None:
            found = gradients.detach().index_select(0, there).cpu()
            call.gradients = found if call.gradients is None else call.gradients + found

        return add

    def compact(self) -> None:
        """Let go of tokens that tokens of later calls have replaced. Not between a call and its backward pass."""
        for call in self._calls:
            stays = call.keys <= self._keys[-1]
            if not stays.all():
                call.keys, call.inputs = call.keys[stays], call.inputs[stays]
                call.members = None if call.members is None else call.members[stays]
                call.gradients = None if call.gradients is None else call.gradients[stays]
        self._calls = [call for call in self._calls if len(call.keys)]

    def tokens(self, *, with_gradients: bool) -> Tokens:
        """The sample. An output that no backward pass has reached does not matter: its gradients are zero."""
        calls = self._calls
        gradients = [
            torch.zeros(len(call.keys), self._width, device="cpu") if call.gradients is None else call.gradients
            for call in calls
        ]
        members = [call.members for call in calls if call.members is not None]
        return Tokens(
            inputs=torch.cat([call.inputs for call in calls]),
            gradients=torch.cat(gradients) if with_gradients else None,
            members=torch.cat(members) if members else None,
            seen=self._seen,
        )
