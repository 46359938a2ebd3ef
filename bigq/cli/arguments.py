"""What options say as text, as numbers, devices and dtypes; a wrong one is a usage error."""

from typing import Annotated

import torch
import typer

__all__ = ["DeviceOption", "device_of", "dtype_of", "numbers"]

DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cuda, cuda:1 or cpu. Default: the GPU, or the CPU if there is none.")
]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def numbers(option: str, text: str) -> list[int]:
    """[1, 16] of "1,16"; raises BadParameter for anything but positive integers."""
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r} is no list of positive numbers; expected one like 1,16", param_hint=option)
    return found


def dtype_of(option: str, text: str | None) -> torch.dtype | None:
    """The dtype called "bf16", "fp16" or "fp32"; None for None."""
    if text is not None and text not in _DTYPES:
        raise typer.BadParameter(f"{text!r} is no dtype; expected one of {', '.join(_DTYPES)}", param_hint=option)
    return None if text is None else _DTYPES[text]


def device_of(text: str | None) -> torch.device:
    """The device that an option names; by default the current GPU, or the CPU if there is none."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{text!r} is no device; expected cuda, cuda:1 or cpu", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{text!r}: torch sees {torch.cuda.device_count()} GPUs", param_hint="--device")
    return device
