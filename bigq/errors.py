"""The errors that bigq raises on purpose.

BigqError
├── ConfigError       a configuration that contradicts itself, the model or the checkpoint
├── CheckpointError   a file or tensor that is missing, damaged or does not fit the model
├── PlacementError    a device map or an offload folder that cannot be used, or too little memory
└── UnsupportedError  a valid request that this device or this model cannot serve

The first three are also `ValueError`s, as those of accelerate are. `UnsupportedError` is also a `RuntimeError`.
"""

__all__ = ["BigqError", "CheckpointError", "ConfigError", "PlacementError", "UnsupportedError"]


class BigqError(Exception):
    """Base class of all errors that bigq raises on purpose."""


class ConfigError(BigqError, ValueError):
    """A configuration contradicts itself, the model or the checkpoint."""


class CheckpointError(BigqError, ValueError):
    """A checkpoint file or tensor is missing, damaged, or does not fit the model."""


class PlacementError(BigqError, ValueError):
    """A device map, a memory limit or an offload folder cannot be used, or there is too little memory."""


class UnsupportedError(BigqError, RuntimeError):
    """A request is valid, but this device or this model cannot serve it."""
