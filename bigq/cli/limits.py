"""--max-memory: the limits of devices as a command line writes them."""

from typing import Annotated

import typer
from accelerate.utils import convert_file_size_to_int

__all__ = ["MaxMemory", "parse_limits"]

MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="DEVICE=SIZE,...",
        help="Memory of each device, such as 0=12GiB,cpu=30GiB; one size alone is that of GPU 0. The GPUs need not be "
        "those of this machine. Default: the free memory of this machine.",
    ),
]


def parse_limits(text: str | None) -> dict[int | str, int | str] | None:
    """{GPU index, "cpu" or "disk": bytes} of "0=12GiB,cpu=30GiB", or of one size; raises BadParameter otherwise."""
    if text is None:
        return None
    limits: dict[int | str, int | str] = {}
    for part in text.split(","):
        device, is_pair, size = part.rpartition("=")
        device = device.strip().removeprefix("cuda:") if is_pair else "0"
        if not (device.isdecimal() or device in ("cpu", "disk")):
            raise typer.BadParameter(f"{text!r} names the device {device!r}; expected a GPU index, cpu or disk")
        try:
            limits[int(device) if device.isdecimal() else device] = convert_file_size_to_int(size.strip())
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} has the size {size!r}; expected one like 12GiB or 900MB") from error
    return limits
