"""What a config.json says of weights that are codes with scales: how large a block is, and what dtype numbers have."""

import re
from collections.abc import Collection, Mapping

import torch

__all__ = ["block_size", "dtype_of_numbers"]

_OF_OTHERS = {"input_activations", "output_activations", "kv_cache_scheme"}  # settings that say nothing of weights
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_of_numbers(config: Mapping[str, object], others: Collection[torch.dtype]) -> torch.dtype:
    """The dtype of the model of a config.json; one of text and images may have it in the configs of its parts.

    Where they say none, or several, it is that of all `others`, the float tensors of the checkpoint; bfloat16 if these
    have several.
    """
    parts = [part for key, part in config.items() if isinstance(part, dict) and key != "quantization_config"]
    said = ({_dtype_said(config)}, {_dtype_said(part) for part in parts} - {None}, {*others} & {*_DTYPES.values()})
    agreed = (next(iter(found)) for found in said if len(found) == 1)
    return next((dtype for dtype in agreed if dtype is not None), torch.bfloat16)


def _dtype_said(config: Mapping[str, object]) -> torch.dtype | None:
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))


def block_size(said: Mapping[str, object]) -> tuple[int, int] | None:
    """The rows and columns of a block of a weight, as a quantization_config says; None if it says none, or several."""
    found, pending, step = set(), [said], 0
    while pending and step < 1000:  # settings of a file may be of any size
        step += 1
        current = pending.pop()
        for key, value in current.items():
            if key in _OF_OTHERS:
                continue
            if key == "block_structure" and isinstance(value, str):  # "128x128", as old files have it
                value = [int(number) if re.fullmatch("[0-9]{1,9}", number) else None for number in value.split("x")]
            if isinstance(value, dict):
                pending.append(value)
            elif key in ("weight_block_size", "block_structure") and isinstance(value, list) and len(value) == 2:
                found.add(tuple(value))
            elif key == "group_size" and value is not None:  # columns of a row
                found.add((1, value))
    sizes = [size for size in found if all(type(number) is int and number > 0 for number in size)]
    return sizes[0] if len(sizes) == len(found) == 1 else None
