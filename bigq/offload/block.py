"""OffloadedBlock: tensors that are copied to the device together, and what its modules hold during a call and after."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bigq.model.tree import assign_tensor, tensor_table
from bigq.offload.in_place import InPlace
from bigq.offload.slot import DeviceSlot
from bigq.offload.transfer import Layout
from bigq.weight.experts import QuantizedExperts

__all__ = ["OffloadedBlock"]


class OffloadedBlock:
    """Offloaded tensors that are copied together: `members` is (owner, name) of each.

    `ahead` says that they are copied before they are needed; those of a module around other blocks are not, because
    they would occupy a slot for the length of all of their calls.
    """

    def __init__(self, members: Iterable[tuple[nn.Module, str]], *, ahead: bool) -> None:
        self.members = list(members)
        self.ahead = ahead
        self._start()

    def _start(self) -> None:
        self.layout: Layout | None = None  # of all of its tensors
        self.in_place: InPlace | None = None  # made of that layout, for calls that do not copy experts
        self.slot: DeviceSlot | None = None  # holds the copies that its calls use
        self.copied: Layout | None = None  # what the slot holds: `layout`, or that of `in_place`
        self.calls: set[int] = set()  # those that have not ended, by id: they end with their objects
        self._own: Sequence[Tensor] | None = None  # its tensors, while copies stand in their place

    @cached_property
    def _tables(self) -> list[tuple[dict[str, Any], str]]:
        """The dicts of the owners themselves: nn.Module's own lookup takes longer than everything else in a call."""
        return [(tensor_table(owner, name), name) for owner, name in self.members]

    @cached_property
    def _in_lists(self) -> list[int]:
        return [i for i, (owner, _) in enumerate(self.members) if isinstance(owner, nn.RNNBase)]

    @cached_property
    def experts(self) -> list[QuantizedExperts]:
        """The fused experts among its modules."""
        return list(dict.fromkeys(owner for owner, _ in self.members if isinstance(owner, QuantizedExperts)))

    def may_read_in_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call with these inputs hits so few experts that reading them in host memory beats copying all.

        The inputs are hidden states [..., H], first or by that name, of the layer or of its experts. A wrong guess
        costs time and never a result. A backward pass reads all experts.
        """
        if not self.experts or torch.is_grad_enabled():
            return False
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor):
            return False
        return all((rows := own.rows_of(x)) is not None and rows <= own.num_experts // 2 for own in self.experts)

    def tensors(self) -> list[Tensor]:
        """What the modules hold now: between calls, the offloaded tensors."""
        return [table[name] for table, name in self._tables]

    def assign(self, tensors: Sequence[Tensor]) -> None:
        """Make `tensors` what the modules hold."""
        for (table, name), tensor in zip(self._tables, tensors, strict=True):
            table[name] = tensor
        for i in self._in_lists:  # an RNN keeps a second list of its weights
            assign_tensor(*self.members[i], tensors[i])

    def use_copies(self, copies: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        """Let the modules hold `copies`; `put_back` undoes it, wherever this is interrupted."""
        self._own = own
        self.assign(copies)

    def put_back(self) -> None:
        """Let the modules hold their own tensors."""
        if self._own is not None:
            self.assign(self._own)
            self._own = None

    def forget_calls(self) -> None:
        """Put back what calls use that have ended unnoticed, such as those of other threads before a fork."""
        self.put_back()
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "ahead": self.ahead}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
