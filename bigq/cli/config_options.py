"""The options that say which weights are quantized into what, and the QuantizationConfig that they make."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bigq.config import QuantizationConfig
from bigq.errors import CheckpointError, ConfigError
from bigq.formats import FORMATS, METHODS, Format, make_format
from bigq.system.json_text import parse_json

__all__ = [
    "AlsoOption",
    "BlockSizeOption",
    "DoubleQuantFlag",
    "FormatOption",
    "MethodOption",
    "MomentsOption",
    "RulesOption",
    "SkipOption",
    "make_config",
    "one_of",
    "read_rules",
]


def one_of(*choices: str) -> Callable[[str | None], str | None]:
    """The callback of an option that takes one of `choices`."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r}; expected one of {', '.join(choices)}")
        return value

    return check


FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        callback=one_of(*FORMATS),
        metavar="|".join(FORMATS),
        help="The format of the weights that no rule names. Default: nf4, and none where there are rules.",
    ),
]
DoubleQuantFlag = Annotated[
    bool, typer.Option("--double-quant", help="Quantize the scales too: 4.13 bits a weight instead of 4.5.")
]
BlockSizeOption = Annotated[
    int | None, typer.Option(help="Weights that share a scale, with nf4 and fp4: 32 to 4096. Default: 64.")
]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        callback=one_of(*METHODS),
        metavar="|".join(METHODS),
        help="How the scales of 4-bit weights are chosen; search loses less, and needs --moments.",
    ),
]
MomentsOption = Annotated[
    Path | None,
    typer.Option("--moments", help="File that bigq.input_moments(model).save wrote, for --method search."),
]
RulesOption = Annotated[
    Path | None,
    typer.Option(
        "--rules",
        help='JSON file with {"pattern": "int8", "pattern": null, "pattern": {"format": "nf4", "block_size": 32}}; '
        "the first pattern that matches a weight says its format, and null keeps it.",
    ),
]
SkipOption = Annotated[list[str] | None, typer.Option("--skip", help="A module to keep; may be repeated.")]
AlsoOption = Annotated[
    list[str] | None, typer.Option("--also", help="A module or weight to quantize in addition; may be repeated.")
]


def make_config(
    weight_format: str | None,
    *,
    rules: Path | None = None,
    double_quant: bool = False,
    block_size: int | None = None,
    skip: Sequence[str] | None = None,
    also: Sequence[str] | None = None,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    method: str = "absmax",
    moments: Path | None = None,
) -> QuantizationConfig:
    """The QuantizationConfig that the options ask for.

    Raises:
        CheckpointError: the file of rules is missing or no JSON.
        ConfigError: an option contradicts another.
    """
    if method == "search" and moments is None:
        raise ConfigError(
            "--method search needs --moments FILE, which bigq.input_moments(model).save(FILE) measures and writes"
        )
    found = {} if rules is None else read_rules(rules)
    return QuantizationConfig(
        weight_format or (None if found else "nf4"),
        rules=found,
        method=method,
        moments=moments,
        double_quant=double_quant or None,
        block_size=block_size,
        skip_modules=tuple(skip or ()),
        also_quantize=tuple(also or ()),
        dtype=dtype,  # type: ignore[arg-type]  # a name becomes the dtype
        compute_dtype=compute_dtype,  # type: ignore[arg-type]
    )


def read_rules(path: Path) -> dict[str, Format | None]:
    """The rules in a JSON file, in their order: {pattern: a name, settings of a format with its name, or null}.

    A list of [pattern, settings], as config.json of a quantized model has it, is taken too.

    Raises:
        CheckpointError: there is no such file, or it is no JSON.
        ConfigError: it holds something else.
    """
    try:
        content, twice = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read the rules in {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if twice:
        raise ConfigError(f"{path} gives {twice[0]!r} twice: a rule has one pattern")
    pairs = list(content.items()) if isinstance(content, dict) else content
    if (
        not pairs
        or not isinstance(pairs, list)
        or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    ):
        raise ConfigError(f"{path} holds no rules; expected {{pattern: format}}")
    return {str(pattern): _format(rule, str(pattern), path) for pattern, rule in pairs}


def _format(rule: object, pattern: str, path: Path) -> Format | None:
    settings = {"format": rule} if isinstance(rule, str) else rule
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or "format" not in settings:
        raise ConfigError(
            f'{path}: the rule {pattern!r} is {rule!r}; expected the name of a format, an object with "format" and '
            "its settings, or null"
        )
    return make_format(settings["format"], **{name: value for name, value in settings.items() if name != "format"})
