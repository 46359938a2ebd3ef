"""`bigq estimate`: the memory that a model needs on each device, from headers alone."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bigq.cli.limits import MaxMemory, parse_limits
from bigq.cli.output import JsonFlag, answers, show, table
from bigq.config import QuantizationConfig
from bigq.dry_run.estimate import TRAININGS, estimate_memory
from bigq.dry_run.inspect_checkpoint import inspect_checkpoint
from bigq.dry_run.memory_estimate import MemoryEstimate, MemoryItem
from bigq.errors import ConfigError
from bigq.formats import FORMATS
from bigq.planning.device_map import STRATEGIES
from bigq.system.text import bytes_text

__all__ = ["command", "read_rules"]

_DEFAULT = "nf4"


@answers
def command(
    location: Annotated[
        str, typer.Argument(metavar="DIR|ID", help="A folder with config.json and weights, or a Hub repository id.")
    ],
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"One of {', '.join(FORMATS)}. Default: {_DEFAULT}, or what the checkpoint is quantized to.",
        ),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Weights that share a scale, with nf4 and fp4.")] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Quantize the scales of nf4 and fp4 too.")
    ] = False,
    rules: Annotated[
        Path | None,
        typer.Option(help='A JSON file of rules: {"lm_head": "int8", "visual.*": null}, or a saved config.json.'),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(STRATEGIES)}, a device such as 0 or cpu, or a JSON file of names and places. "
            "Default: auto with --max-memory, otherwise one GPU."
        ),
    ] = None,
    max_memory: MaxMemory = None,
    context: Annotated[
        int, typer.Option(help="Tokens of a sequence: prompt and answer, or a training example.")
    ] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    train: Annotated[str, typer.Option(help=f"One of {', '.join(TRAININGS)}.")] = TRAININGS[0],
    rank: Annotated[int, typer.Option(help="Rank of the adapters that qlora trains.")] = 16,
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
    _one_of("--format", format_name, (*FORMATS, None))
    _one_of("--train", train, TRAININGS)
    config = _config(location, format_name, block_size, double_quant, rules)
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
    show(found, as_json=as_json, render=lambda out: _render(out, found, show_plan))
    if found.fits is False:
        raise typer.Exit(1)


def read_rules(path: Path) -> dict[str, Any]:
    """The rules of a JSON file, as QuantizationConfig takes them; raises ConfigError for other content."""
    try:
        said = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise ConfigError(f'{path} holds {type(said).__name__}; expected rules such as {{"lm_head": "int8"}}')
    return said


def _config(
    location: str, format_name: str | None, block_size: int | None, double_quant: bool, rules: Path | None
) -> QuantizationConfig | None:
    """The config that the options ask for; None for a checkpoint that is quantized, if they ask for nothing."""
    asked = format_name is not None or rules is not None or block_size is not None or double_quant
    if not asked and inspect_checkpoint(location).quantized_by is not None:
        return None  # estimate refuses what bigq does not read
    settings: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant or None}
    said = {} if rules is None else read_rules(rules)
    if "quant_method" in said:
        return QuantizationConfig.from_dict(said)
    made = {pattern: _rule(f"{rules}: {pattern!r}", value) for pattern, value in said.items()}
    return QuantizationConfig(format_name or _DEFAULT, rules=made, **settings)


def _rule(where: str, value: object) -> Any:
    """The format of a rule: a name, null, or settings with the key "format"."""
    if isinstance(value, dict):
        settings = dict(value)
        name = settings.pop("format", None)
        return QuantizationConfig(name, **settings).weight_format()
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(f'{where} is {value!r}; expected the name of a format, null, or {{"format": "nf4", ...}}')


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


def _one_of(option: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        named = ", ".join(name for name in known if name is not None)
        raise typer.BadParameter(f"{option} is {value!r}; expected one of {named}")


def _render(out: Console, found: MemoryEstimate, show_plan: bool) -> None:
    if show_plan:
        out.print(found.plan.table(out.width), markup=False)
    else:
        out.print(found.plan.summary(), markup=False)
    rows = [(item.name, item.phase, item.device, _amount(item)) for item in found.items]
    out.print(table(("what", "when", "device", "bytes"), rows, text=3))
    sums = []
    for device in found.devices:
        for phase in found.phases:
            nbytes, is_all = found.needed(device, phase)
            has = bytes_text(found.limits[device]) if device in found.limits else "unknown"
            sums.append((device, phase, f"{'' if is_all else 'more than '}{bytes_text(nbytes)}", has))
    out.print(table(("device", "when", "needs", "has"), sums, text=2))
    out.print(found.verdict(), markup=False, soft_wrap=True)
    out.print("\nhow the numbers are made:", markup=False)
    for name, how in found.explanations():
        out.print(f"  {name}: {how}", markup=False, soft_wrap=True)


def _amount(item: MemoryItem) -> str:
    if item.nbytes is None:
        return "unknown"
    return f"{'' if item.is_exact else 'about '}{bytes_text(item.nbytes)}"
