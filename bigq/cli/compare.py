"""`bigq compare`: a quantized model beside its source: bytes, errors, perplexity, speed and memory."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bigq.cli.arguments import DeviceOption, device_of, dtype_of, numbers
from bigq.cli.config_options import (
    AlsoOption,
    BlockSizeOption,
    DoubleQuantFlag,
    FormatOption,
    MethodOption,
    MomentsOption,
    RulesOption,
    SkipOption,
    make_config,
)
from bigq.cli.output import JsonFlag, answers, note, show, table
from bigq.errors import ConfigError
from bigq.evaluation.compare import compare
from bigq.evaluation.comparison import MEASURED, WEIGHTS, Comparison
from bigq.evaluation.plot import check_plot, plot_comparison

__all__ = ["EXAMPLES", "command"]

EXAMPLES = (
    "bigq compare my-model my-model-nf4 --text news.txt --plot out.png",
    'bigq compare owner/name --format nf4 --batch "" --json',
)


@answers
def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The float model: a folder or a Hub id.")],
    quantized: Annotated[
        str | None,
        typer.Argument(
            metavar="DST",
            help="The same model, quantized by bigq or bitsandbytes. Without it, SRC is quantized on the fly.",
        ),
    ] = None,
    weight_format: FormatOption = None,
    double_quant: DoubleQuantFlag = False,
    block_size: BlockSizeOption = None,
    rules: RulesOption = None,
    skip: SkipOption = None,
    also: AlsoOption = None,
    method: MethodOption = "absmax",
    moments: MomentsOption = None,
    text: Annotated[Path | None, typer.Option(help="A text file (UTF-8) of which perplexity is measured.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = 4096,
    context: Annotated[int, typer.Option(min=2, help="Tokens that the models see at once, at most.")] = 512,
    batch: Annotated[str, typer.Option(help='Sequences at once, separated by commas; "" measures no speed.')] = "1,8",
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt, for the speed. Default: 512 on a GPU, 64 on a CPU.")
    ] = None,
    new: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that it writes, for the speed. Default: 32 on a GPU, 8 on a CPU."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of what is not quantized, in both models, with --format: bf16, fp16 or fp32.")
    ] = None,
    device: DeviceOption = None,
    device_map: Annotated[str | None, typer.Option(help='"auto" for models that do not fit on the GPU.')] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture to this file, such as out.png.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure a quantized model beside the model that it was made from.

    One model is in memory at a time. Speeds are those of eager calls, with random tokens.
    """
    asks = (weight_format, rules, skip, also, moments, block_size)
    if quantized is not None and (double_quant or method != "absmax" or any(option is not None for option in asks)):
        raise typer.BadParameter(
            "options that quantize SRC say nothing of DST: pass one or the other", param_hint="DST"
        )
    if plot is not None:
        check_plot(plot)  # now, and not after minutes
    config = None
    if quantized is None:
        config = make_config(
            weight_format,
            rules=rules,
            double_quant=double_quant,
            block_size=block_size,
            skip=skip,
            also=also,
            method=method,
            moments=moments,
        )
    found = compare(
        source,
        quantized,
        config,
        text=None if text is None else _read(text),
        tokens=tokens,
        context=context,
        batches=numbers("--batch", batch) if batch else [],
        prompt_tokens=prompt,
        new_tokens=new,
        dtype=dtype_of("--dtype", dtype),
        device=device_of(device),
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        progress=note,
    )
    if plot is not None:
        plot_comparison(found, plot)
        note(f"wrote {plot}")
    show(found, as_json=as_json, render=lambda console: _print(console, found))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}") from error


def _print(console: Console, found: Comparison) -> None:
    console.print(table(MEASURED, found.rows(), title=f"{found.source.name} and {found.quantized.name}"))
    console.print(table(WEIGHTS, found.group_rows(), title="weights that differ", text=2))
    for line in found.notes:
        console.print(line)
