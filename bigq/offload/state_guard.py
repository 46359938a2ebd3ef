"""StateGuard: a model whose checkpoint was cut short raises an error where its state is asked for, instead of dying.

Tensors that stay in a checkpoint are memory maps. Reading one beyond the end of its file is a SIGBUS, which ends the
process. Calls read by descriptor; `state_dict`, `deepcopy` and `pickle` read the maps.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from bigq.offload.block import OffloadedBlock
from bigq.offload.space import refuse_cut_short

__all__ = ["StateGuard"]


class StateGuard:
    """A hook that runs before `state_dict` of a model with these offloaded `blocks`.

    It is pickled, and deep-copied, before the children of the model, and looks at the files then too.

    Raises:
        CheckpointError: a file that holds tensors of the blocks is shorter than it was when it was mapped.
    """

    def __init__(self, blocks: Sequence[OffloadedBlock]) -> None:
        self.blocks = list(blocks)

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        self._check()
        return vars(self)

    def _check(self) -> None:
        refuse_cut_short([tensor for block in self.blocks for tensor in block.tensors()])
