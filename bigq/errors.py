"""The errors bigq raises; every refusal of a file, a config or a placement is one of them.

BigqError
├── ConfigError       a configuration that contradicts itself, the model or the checkpoint
├── CheckpointError   a file or tensor that is missing, damaged or does not fit the model
├── PlacementError    a device map or offload folder that cannot be honoured
└── UnsupportedError  a correct request that this device or this model cannot serve

The first three are also `ValueError`s, as accelerate's are; `UnsupportedError` is also a `RuntimeError`.
"""

__all__ = ["BigqError", "CheckpointError", "ConfigError", "PlacementError", "UnsupportedError"]


class BigqError(Exception):
    """Base class of every error raised on purpose by bigq."""


class ConfigError(BigqError, ValueError):
    """A configuration contradicts itself, the model or the checkpoint."""


class CheckpointError(BigqError, ValueError):
    """A checkpoint file or tensor is missing, damaged, or does not fit the model."""


class PlacementError(BigqError, ValueError):
    """A device map, a memory budget or an offload folder cannot be honoured."""


class UnsupportedError(BigqError, RuntimeError):
    """A well-formed request that this device or this model cannot serve."""
