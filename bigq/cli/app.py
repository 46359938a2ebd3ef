"""The command line `bigq`: which commands there are. Each is one function, in the file of its name."""

from collections.abc import Sequence
from typing import Annotated

import typer

from bigq.cli import compare, doctor, estimate, inspect, quantize
from bigq.cli.bench import app as bench

__all__ = ["app", "main"]

app = typer.Typer(
    name="bigq",
    help="Quantize models to 4 and 8 bits, look into checkpoints, and measure what quantizing costs and saves.",
    epilog="`bigq COMMAND --help` explains a command and shows examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it prints local variables; Python's own traceback is enough for a bug
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import bigq

        typer.echo(f"bigq {bigq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """What every command shares."""


def _examples(*lines: str) -> str:
    return "\n\n".join(("Examples:", *lines))  # typer makes one line of a paragraph


app.command("quantize", epilog=_examples(*quantize.EXAMPLES))(quantize.command)
app.command("inspect", epilog=_examples(*inspect.EXAMPLES))(inspect.command)
app.command("estimate", epilog=_examples(*estimate.EXAMPLES))(estimate.command)
app.command("compare", epilog=_examples(*compare.EXAMPLES))(compare.command)
app.add_typer(bench, name="bench")
app.command("doctor", epilog=_examples(*doctor.EXAMPLES))(doctor.command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in `arguments`, by default those of the process, and leave the process with its exit code."""
    app(args=None if arguments is None else list(arguments), prog_name="bigq")
