"""Extra states: what modules keep in a state dict beside tensors, by torch's get_extra_state and set_extra_state."""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from bigq.checkpoint import Adapter, Checkpoint, StoredTensor
from bigq.checkpoint.state_dict import EXTRA_STATE
from bigq.errors import CheckpointError
from bigq.model.tree import tensor_name
from bigq.system.text import shortlist

__all__ = ["ExtraStates"]


class ExtraStates(Adapter):
    """`checkpoint` without the extra states that `modules`, by name, take; they are read at once.

    `files` are those of `checkpoint`.
    An extra state that no module takes is a tensor like others, or, if it is another object, refused where `strict`.
    """

    def __init__(self, checkpoint: Checkpoint, modules: Mapping[str, nn.Module], *, strict: bool) -> None:
        super().__init__(checkpoint)
        self.files = checkpoint.files
        takers = {
            tensor_name(name, EXTRA_STATE): module
            for name, module in modules.items()
            if type(module).set_extra_state is not nn.Module.set_extra_state
        }
        unknown = [repr(name) for name in checkpoint.extra_states if name not in takers]
        if unknown and strict:
            raise CheckpointError(
                f"{checkpoint.files[0].parent} holds {len(unknown)} extra states of modules that the model does not "
                f"have: {shortlist(unknown)}; strict=False ignores them"
            )
        tensors = [name for name in takers if name in checkpoint.tensors]
        states = {**checkpoint.extra_states, **{name: tensor.clone() for name, tensor in checkpoint.read(tensors)}}
        self._states = [(module, states[name]) for name, module in takers.items() if name in states]
        self.tensors: Mapping[str, StoredTensor] = checkpoint.tensors
        if tensors:
            rest = {name: stored for name, stored in checkpoint.tensors.items() if name not in takers}
            self.tensors = MappingProxyType(rest)

    @property
    def is_needed(self) -> bool:
        """Whether there is an extra state that a module takes."""
        return bool(self._states)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as the checkpoint reads them."""
        return self._source.read(names)

    def hand_over(self) -> None:
        """Give the modules their extra states."""
        for module, state in self._states:
            module.set_extra_state(state)
