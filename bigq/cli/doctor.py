"""`bigq doctor`: whether this machine runs bigq, which kernels it uses, and what to do about each problem."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bigq.cli.arguments import DeviceOption, device_of
from bigq.cli.output import JsonFlag, answers, show, table
from bigq.doctor.examine import Diagnosis, examine
from bigq.doctor.kernels import KernelChoice

__all__ = ["EXAMPLES", "command"]

EXAMPLES = ("bigq doctor", "bigq doctor --folder /mnt/nvme --json")

_SHOWN = 10  # problems


@answers
def command(
    folder: Annotated[
        Path | None, typer.Option(help="Also measure reads from this folder's drive, with a file of 256 MB.")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Examine this machine: releases, the GPU, kernels, a self-test, and the rates of the link and the drive.

    The exit code is 1 if the self-test fails.
    """
    found = examine(device_of(device), folder=folder)
    show(found, as_json=as_json, render=lambda console: _print(console, found))
    if not found.is_right:
        raise typer.Exit(1)


def _print(console: Console, found: Diagnosis) -> None:
    console.print(
        f"{found.environment.device}, {found.environment.cores} cores, {found.environment.system}", markup=False
    )
    libraries = [[own.name, own.version or "-", own.status] for own in found.libraries]
    console.print(table(["library", "release", ""], libraries, text=3))
    if found.gpu is not None:
        gpu = found.gpu
        console.print(
            f"{gpu.name}: compute capability {gpu.capability}, {gpu.multiprocessors} multiprocessors, "
            f"{gpu.free_nbytes / 1e9:.1f} of {gpu.memory_nbytes / 1e9:.1f} GB free, driver {gpu.driver or 'unknown'}, "
            f"torch built for {gpu.runtime}",
            markup=False,
        )
    for switch in found.switches:
        console.print(f"{switch.name}: {'on' if switch.is_on else 'off'} ({switch.why})", markup=False)
    console.print(table(["format", "tokens", "N x K", "kernel", "why"], list(_kernel_rows(found.kernels)), text=5))
    passed = sum(check.passed for check in found.checks)
    console.print(f"self-test: {passed} of {len(found.checks)} checks passed", markup=False)
    for rate in found.rates:
        console.print(f"{rate.what}: {rate.bytes_per_s / 1e9:.2f} GB/s", markup=False)
    locked = "no limit" if found.locked_memory_nbytes is None else f"{found.locked_memory_nbytes / 1e6:.1f} MB"
    console.print(
        f"free host memory: {found.usable_memory_nbytes / 1e9:.1f} GB; of it may be locked: {locked}",
        markup=False,
    )
    if not found.problems:
        console.print("no problems")
    for problem in found.problems[:_SHOWN]:
        console.print(f"problem: {problem.what}\n  {problem.advice}", markup=False)
    if len(found.problems) > _SHOWN:
        console.print(f"and {len(found.problems) - _SHOWN} more problems, which --json lists")


def _kernel_rows(kernels: Iterable[KernelChoice]) -> Iterable[list[str]]:
    """One row for the shapes of one format and number of tokens that get one kernel for one reason."""
    alike: dict[tuple[str, int, str, str], list[str]] = {}
    for row in kernels:
        shapes = alike.setdefault((row.format, row.tokens, row.way, row.why), [])
        if row.n:
            shapes.append(f"{row.n}x{row.k}")
    for (name, tokens, way, why), shapes in alike.items():
        yield [name, str(tokens) if tokens else "all", ", ".join(shapes) or "all", way, why]
