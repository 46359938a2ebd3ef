"""`bigq compare`: a quantized model beside its source: bytes, errors, perplexity, speed and memory."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bigq.cli.arguments import DeviceOption, device_of, dtype_of, numbers
from bigq.cli.output import JsonFlag, answers, note, show, table
from bigq.config import QuantizationConfig
from bigq.errors import ConfigError
from bigq.evaluation.compare import compare
from bigq.evaluation.comparison import MEASURED, WEIGHTS, Comparison
from bigq.evaluation.plot import check_plot, plot_comparison

__all__ = ["command"]


@answers
def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The float model: a folder or a Hub id.")],
    quantized: Annotated[
        str | None,
        typer.Argument(metavar="DST", help="The same model, quantized by bigq or bitsandbytes. Or pass --format."),
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("--format", help="Quantize SRC on the fly instead of reading DST: nf4, fp4 or int8.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Weights that share a scale, with nf4 and fp4.")] = None,
    double_quant: Annotated[
        bool | None, typer.Option("--double-quant", help="Quantize the scales too, with nf4 and fp4.")
    ] = None,
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
    if (quantized is None) == (format_name is None):
        raise typer.BadParameter("pass either DST or --format", param_hint="DST")
    if plot is not None:
        check_plot(plot)  # now, and not after minutes
    config = (
        None
        if format_name is None
        else QuantizationConfig(format_name, block_size=block_size, double_quant=double_quant)
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
