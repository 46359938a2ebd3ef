"""`python -m bigq`: the command line; `bench` is its only command."""

import argparse
from collections.abc import Sequence
from functools import partial

from bigq.cli.bench import FORMATS, SHAPES, TOKENS, bench, parse_shapes, parse_tokens
from bigq.errors import UnsupportedError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in `arguments` (by default those of the process); exits with 2 and a message on bad ones."""
    parser = argparse.ArgumentParser(prog="python -m bigq")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("bench", help="time this library's linears on this GPU, beside bf16")
    command.add_argument("--shapes", type=parse_shapes, default=SHAPES, help="N x K, default %(default)s")
    command.add_argument("--tokens", type=parse_tokens, default=TOKENS, help="rows of x, default %(default)s")
    command.add_argument(
        "--format", choices=FORMATS, nargs="+", default=list(FORMATS), metavar="FORMAT", help=f"of {', '.join(FORMATS)}"
    )
    options = parser.parse_args(arguments)
    try:
        bench(options.shapes, options.tokens, options.format, partial(print, flush=True))
    except UnsupportedError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
