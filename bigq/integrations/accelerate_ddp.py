"""accelerate_ddp: accelerate, and so the trainers, wrap a model in frozen shards in DDP instead of refusing it.

accelerate refuses models with DTensors, because DDP would send those of the first process to all. DDP ignores frozen
shards. Only `Accelerator.prepare` for several GPUs asks, so no test on a CPU has met the refusal.
"""

from functools import wraps

from accelerate import accelerator
from torch import nn

__all__ = ["UNITS", "let_accelerate_wrap"]

UNITS = "_bigq_gathered_units"  # an attribute of a model in frozen shards
_ASKS = "model_has_dtensor"  # accelerate 1.10 or newer


def let_accelerate_wrap() -> None:
    """Let accelerate find no DTensor in models in frozen shards. It finds those of all others as before."""
    asked = getattr(accelerator, _ASKS, None)
    if asked is None or hasattr(asked, UNITS):
        return

    @wraps(asked)
    def has_dtensor(model: nn.Module) -> bool:
        return UNITS not in vars(model) and bool(asked(model))

    setattr(has_dtensor, UNITS, True)
    setattr(accelerator, _ASKS, has_dtensor)
