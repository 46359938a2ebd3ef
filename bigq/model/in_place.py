"""ModelTensors: the tensors of a model as a Source, for a load that quantizes the model in place."""

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from bigq.checkpoint import StoredTensor, refuse_unknown
from bigq.errors import CheckpointError
from bigq.model.tree import ModelTree, held_tensor, is_dense

__all__ = ["ModelTensors"]


class ModelTensors:
    """A Source of a model's persistent parameters and buffers, each once under its first name, in module order.

    Those that are not dense are left out: nothing is done with them.
    """

    in_place = True

    def __init__(self, model: nn.Module) -> None:
        tree = ModelTree(model)
        self._modules = tree.modules
        self._kind = type(model).__name__
        self.tensors = {
            group.names[0]: StoredTensor(
                name=group.names[0],
                shape=group.tensor.shape,
                dtype=group.tensor.dtype,
                where=f"<{self._kind}>",
            )
            for group in tree.tensors
            if group.persistent and is_dense(group.tensor)
        }

    def check(self) -> None:
        """Raise a CheckpointError if a tensor is on meta."""
        empty = [name for name in self.tensors if self._tensor(name).is_meta]
        if empty:
            raise CheckpointError(
                f"{len(empty)} tensors of {self._kind} are on meta, {empty[0]} among them: "
                "pass weights_location, the checkpoint to fill them from"
            )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in module order. The tensors are the model's own, not copies."""
        refuse_unknown(names, self.tensors, self._kind)
        wanted = set(names)
        return ((name, self._tensor(name).detach()) for name in self.tensors if name in wanted)

    def _tensor(self, name: str) -> Tensor:
        return held_tensor(self._modules, name)
