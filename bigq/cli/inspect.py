"""`bigq inspect`: who quantized a checkpoint and how, what it holds, and whether bigq reads it."""

from typing import Annotated

import typer
from rich.console import Console

from bigq.cli.limits import MaxMemory, parse_limits
from bigq.cli.output import JsonFlag, answers, show, table
from bigq.dry_run.inspect_checkpoint import CheckpointSummary, inspect_checkpoint
from bigq.system.text import bytes_text

__all__ = ["EXAMPLES", "command"]

EXAMPLES = (
    "bigq inspect ./llama",
    "bigq inspect owner/name --max-memory 12GiB",
    "bigq inspect model.safetensors --json",
)


@answers
def command(
    location: Annotated[
        str, typer.Argument(metavar="DIR|FILE|ID", help="A folder, a file of weights, or a Hub repository id.")
    ],
    max_memory: MaxMemory = None,
    as_json: JsonFlag = False,
) -> None:
    """Say who quantized a checkpoint and how, what it holds, and whether bigq reads it.

    Only headers and config.json are read; of a Hub repository, no weights are downloaded. Exit code 1: the weights do
    not fit into --max-memory.
    """
    found = inspect_checkpoint(location, max_memory=parse_limits(max_memory))
    show(found, as_json=as_json, render=lambda out: _render(out, found))
    if max_memory is not None and not found.fits:
        raise typer.Exit(1)


def _render(out: Console, found: CheckpointSummary) -> None:
    parameters = "unknown" if found.parameters is None else f"{found.parameters:,}"
    bits = "" if found.bits is None else f", {found.bits:.2f} bits a parameter"
    settings = ", ".join(f"{name}={value}" for name, value in found.settings.items() if not isinstance(value, dict))
    lines = {
        "checkpoint": f"{found.location} ({len(found.files)} file{'s' if len(found.files) > 1 else ''})",
        "model": found.model or "config.json names none",
        "quantized by": found.quantized_by or "nobody: it is not quantized",
        "settings": settings if found.quantized_by else "",
        "parameters": parameters,
        "size": f"{bytes_text(found.nbytes)}{bits}",
        "read by bigq": "yes" if found.is_readable else "no",
        "what to do": found.advice,
        "fits": _fits(found),
    }
    for name, value in lines.items():
        if value:
            out.print(f"{name + ':':14}{value}", markup=False, soft_wrap=True)
    rows = [
        (group.name, group.format, f"{group.count:,}", _count(group.parameters), bytes_text(group.nbytes))
        for group in found.groups
    ]
    out.print(table(("weights", "format", "count", "parameters", "size"), rows, text=2))
    sums = [
        (name, *(f"{row['count']:,}", _count(row["parameters"]), bytes_text(row["nbytes"] or 0)))
        for name, row in found.formats.items()
    ]
    out.print(table(("format", "count", "parameters", "size"), sums))


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _fits(found: CheckpointSummary) -> str:
    if found.fits is None and found.limits:
        return "unknown: --max-memory names neither a GPU nor cpu"
    if found.fits is None:
        return "unknown: this machine has no GPU; pass --max-memory 12GiB"
    room = ", ".join(f"{device} {bytes_text(nbytes)}" for device, nbytes in found.limits.items())
    return (
        f"{'yes' if found.fits else 'no'}, the weights as they are ({room}; `bigq estimate` counts what else it needs)"
    )
