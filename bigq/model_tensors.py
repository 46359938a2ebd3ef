"""ModelTensors: a model's own tensors, described and read as a checkpoint's are."""

from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor, nn

from bigq.checkpoint import TensorInfo
from bigq.errors import CheckpointError
from bigq.selection import tensor_key

__all__ = ["ModelTensors"]


class ModelTensors:
    """The persistent parameters and buffers of `model`, each once, in module order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, TensorInfo] = {}
        seen: set[object] = set()
        where = Path(f"<{type(model).__name__}>")
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and tensor_key(tensor) not in seen:
                seen.add(tensor_key(tensor))
                self.tensors[name] = TensorInfo(name=name, shape=tensor.shape, dtype=tensor.dtype, file=where)

    def refuse_meta(self) -> None:
        """Raise a CheckpointError if a tensor holds no numbers."""
        empty = [name for name in self.tensors if self._tensor(name).is_meta]
        if empty:
            raise CheckpointError(
                f"{len(empty)} tensors of {type(self.model).__name__} are on meta, {empty[0]} among them: "
                "pass weights_location, the checkpoint to fill them from"
            )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in module order; the tensor is the model's own, not a copy."""
        wanted = set(names)
        for name in self.tensors:
            if name in wanted:
                yield name, self._tensor(name).detach()

    def _tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(path), leaf)
        return tensor
