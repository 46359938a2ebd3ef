"""`bigq estimate`: the memory that a model needs on each device, from headers alone."""

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from bigq.cli.config_options import (
    AlsoOption,
    BlockSizeOption,
    DoubleQuantFlag,
    FormatOption,
    RulesOption,
    SkipOption,
    make_config,
    one_of,
)
from bigq.cli.limits import MaxMemory, parse_limits
from bigq.cli.output import JsonFlag, answers, show, table
from bigq.dry_run.estimate import TRAININGS, estimate_memory
from bigq.dry_run.inspect_checkpoint import inspect_checkpoint
from bigq.dry_run.memory_estimate import ITEM_COLUMNS, SUM_COLUMNS, MemoryEstimate
from bigq.errors import ConfigError
from bigq.planning.device_map import STRATEGIES

__all__ = ["EXAMPLES", "command"]

EXAMPLES = (
    "bigq estimate owner/name",
    "bigq estimate ./llama --format int8 --max-memory 0=12GiB,cpu=30GiB --context 8192",
    "bigq estimate ./llama --train qlora --rank 16 --max-memory 24GiB",
)


@answers
def command(
    location: Annotated[
        str, typer.Argument(metavar="DIR|ID", help="Folder with config.json and weights, or Hub repo (owner/name).")
    ],
    format_name: FormatOption = None,
    double_quant: DoubleQuantFlag = False,
    block_size: BlockSizeOption = None,
    rules: RulesOption = None,
    skip: SkipOption = None,
    also: AlsoOption = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(STRATEGIES)}, a device such as 0 or cpu, or a JSON file of names and places. "
            "Default: auto with --max-memory, otherwise one GPU."
        ),
    ] = None,
    max_memory: MaxMemory = None,
    context: Annotated[
        int, typer.Option(help="Tokens of a sequence: prompt and answer, or a training example.", min=1)
    ] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 1,
    train: Annotated[
        str,
        typer.Option(
            callback=one_of(*TRAININGS),
            metavar="|".join(TRAININGS),
            help="What is trained: LoRA adapters on every linear but the output head, or nothing.",
        ),
    ] = TRAININGS[0],
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 16,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    show_plan: Annotated[bool, typer.Option("--plan", help="Also show what becomes of every weight.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say how much memory a model needs on each device, item by item, and how each number is made.

    Only headers and configs are read. Exact numbers follow from the shapes of tensors; "about" marks the results of
    formulas, and "unknown" is what nobody can say. Exit code 1: it does not fit.
    """
    asked = format_name or double_quant or block_size or rules or skip or also
    config = None
    if asked or inspect_checkpoint(location).quantized_by not in ("bigq", "bitsandbytes"):
        config = make_config(
            format_name, rules=rules, double_quant=double_quant, block_size=block_size, skip=skip, also=also
        )
    found = estimate_memory(
        location,
        config,
        _device_map(device_map),
        max_memory=parse_limits(max_memory),
        context=context,
        batch=batch,
        train=train,
        rank=rank,
        trust_remote_code=trust_remote_code,
    )
    show(_Answer(found, show_plan), as_json=as_json, render=lambda out: _render(out, found, show_plan))
    if found.fits is False:
        raise typer.Exit(1)


class _Answer(NamedTuple):
    """An estimate, and whether the plan of every tensor is shown with it."""

    found: MemoryEstimate
    show_plan: bool

    def to_dict(self) -> dict[str, object]:
        return self.found.to_dict(with_tensors=self.show_plan)


def _device_map(text: str | None) -> Any:
    """A device map as a command line writes it."""
    if text is None or text in STRATEGIES or text == "cpu":
        return text
    if text.removeprefix("cuda:").isdecimal():
        return int(text.removeprefix("cuda:"))
    path = Path(text)
    if not path.is_file():
        raise typer.BadParameter(
            f"--device-map is {text!r}; expected one of {list(STRATEGIES)}, a device or a JSON file"
        )
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


def _render(out: Console, found: MemoryEstimate, show_plan: bool) -> None:
    if show_plan:
        out.print(found.plan.table(out.width), markup=False)
    else:
        out.print(found.plan.summary(), markup=False)
    out.print(table(ITEM_COLUMNS, found.item_rows(), text=3))
    out.print(table(SUM_COLUMNS, found.sum_rows(), text=2))
    out.print(found.verdict(), markup=False, soft_wrap=True)
    out.print("\nhow the numbers are made:", markup=False)
    for name, how in found.explanations():
        out.print(f"  {name}: {how}", markup=False, soft_wrap=True)
