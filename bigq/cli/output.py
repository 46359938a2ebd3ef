"""How every command answers: a result on stdout, all else on stderr, and exit codes that scripts can rely on.

0: done. 1: refused or failed, said in one message. 2: wrong usage. 130: stopped with Ctrl-C.
"""

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec, Protocol, TextIO, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigq.errors import BigqError

__all__ = ["JsonFlag", "Result", "answers", "note", "print_line", "show", "table"]

_WIDTH = 120  # characters of a table that goes to a file or a pipe

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]

_OUTS: list[TextIO] = []  # the stdout of each running command

_Arguments = ParamSpec("_Arguments")
_Returned = TypeVar("_Returned")


class Result(Protocol):
    """What a command's library function returns."""

    def to_dict(self) -> Mapping[str, object]:
        """The result as JSON can hold it."""


def answers(command: Callable[_Arguments, _Returned]) -> Callable[_Arguments, _Returned]:
    """Decorate a command: what it refuses becomes one message on stderr and exit code 1, Ctrl-C becomes 130.

    Warnings become lines on stderr, and so does what a library prints. Only `show` and `print_line` write to stdout.
    """

    @wraps(command)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Returned:
        try:
            with _all_else_on_stderr():
                return command(*args, **kwargs)
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # whoever reads the output has left: typer ends without a message
        except (BigqError, ImportError, torch.OutOfMemoryError) as error:
            note(f"error: {error}")
        except OSError as error:
            note(f"error: {_said(error)}")
        raise typer.Exit(1)

    return run


def show(result: Result, *, as_json: bool, render: Callable[[Console], object]) -> None:
    """Write `result` to stdout: one JSON object, or what `render` prints to a console of rich.

    JSON has no infinity and no NaN: they become null.
    """
    out = _stdout()
    if as_json:
        out.write(json.dumps(_as_json(result.to_dict()), indent=2) + "\n")
    else:
        render(_console(out))
    out.flush()


def print_line(line: str) -> None:
    """Write a line to stdout at once, for a command that has a part of its result early."""
    out = _stdout()
    out.write(f"{line}\n")
    out.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, text: int = 1) -> Table:
    """A table of rich: the first `text` columns to the left, the numbers after them to the right."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if number < text else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))  # Text: brackets in names are no markup
    return made


def note(message: str) -> None:
    """Write a line to stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def _all_else_on_stderr() -> Iterator[None]:
    """Send `print` and warnings to stderr, and keep the stdout that `show` writes to."""
    _OUTS.append(sys.stdout)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.showwarning = _show_warning
            yield
    finally:
        _OUTS.pop()


def _stdout() -> TextIO:
    return _OUTS[-1] if _OUTS else sys.stdout


def _console(out: TextIO) -> Console:
    return Console(file=out, width=None if out.isatty() else _WIDTH, highlight=False)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    note(f"warning: {message}")


def _said(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    names = [str(Path(str(name))) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: {error.strerror}"


def _as_json(value: object) -> object:
    """`value` with None for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
