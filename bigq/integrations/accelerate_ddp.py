"""accelerate_ddp: DDP takes the model in frozen shards, also behind accelerate and the trainers, and no other.

DDP sends the tensors of the first process to all. It leaves out those that `shard_frozen` names as an attribute of its
model. Of another model, a part of that one or one that holds it, DDP would send the rows of the first process.
accelerate refuses all models with DTensors for that. Only `Accelerator.prepare` for several GPUs asks, so no test on a
CPU has met the refusal.
"""

from functools import cache, wraps

from accelerate import accelerator
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from bigq.errors import UnsupportedError
from bigq.interop.frozen_weights import are_frozen_shards, units_in
from bigq.ops.sharding import sharded_parameters

__all__ = ["UNITS", "let_ddp_wrap"]

UNITS = "_bigq_gathered_units"  # an attribute of a model in frozen shards
_ASKS = "model_has_dtensor"  # accelerate 1.10 or newer


@cache
def let_ddp_wrap() -> None:
    """Let accelerate find no DTensor in frozen shards, and DDP refuse them in other models than their own."""
    register_module_module_registration_hook(_refuse_others)
    asked = getattr(accelerator, _ASKS, None)
    if asked is None:
        return

    @wraps(asked)
    def has_dtensor(model: nn.Module) -> bool:
        return bool(asked(model)) and not all(
            are_frozen_shards(module) for module, _, _ in sharded_parameters(model.modules())
        )

    setattr(accelerator, _ASKS, has_dtensor)


def _refuse_others(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name != "module" or child is None or not isinstance(parent, DistributedDataParallel):
        return
    if UNITS in vars(child) or not units_in(child):
        return
    how = "holds" if any(UNITS in vars(module) for module in child.modules()) else "is a part of"
    raise UnsupportedError(
        f"{type(child).__name__} {how} the model that shard_frozen was called with, and DDP would send the rows of the "
        "first process to all: wrap the model that shard_frozen was called with, or call shard_frozen with the one to "
        "wrap, after adapters were added and before torch.compile"
    )
