"""Checkpoints as they come: where their files are, which tensors they hold, and the tensors one by one."""

from bigq.checkpoint.reader import Checkpoint
from bigq.checkpoint.tensor_info import TensorInfo

__all__ = ["Checkpoint", "TensorInfo"]
