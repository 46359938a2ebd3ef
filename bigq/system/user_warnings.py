"""user_warnings: warnings that point to the line of the user's code which led to them."""

import warnings
from inspect import currentframe

__all__ = ["warn"]

# What stands between a user's line and bigq. Python skips files by itself from 3.12 on (`skip_file_prefixes`).
_OURS_AND_THROUGH = frozenset(
    ("bigq", "bigq_kernels", "torch", "transformers", "peft", "accelerate", "diffusers", "sentence_transformers", "trl")
)
_OF_PYTHON = frozenset(("contextlib", "functools", "concurrent", "threading"))


def warn(message: str) -> None:
    """Warn of `message` at the innermost line that is neither of bigq nor of a library that has called it.

    In a thread of bigq there is none: then the outermost line is named.
    """
    level, frame = 1, currentframe()
    while frame is not None and frame.f_back is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _OURS_AND_THROUGH and package not in _OF_PYTHON:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
