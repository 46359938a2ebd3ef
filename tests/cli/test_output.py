"""How commands answer: what goes to stdout and to stderr, and with which exit code."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
import typer

from bigq import CheckpointError
from bigq.cli import output
from bigq.cli.app import main


class Numbers:
    def to_dict(self):
        return {"nbytes": 12, "loss": math.inf, "rows": [(1.5, math.nan)], 3: "[bold]"}


def run(body, *arguments):
    """The exit code of a command with this body."""
    app = typer.Typer()
    app.command()(output.answers(body))
    with pytest.raises(SystemExit) as stopped:
        app(args=list(arguments), prog_name="bigq")
    return stopped.value.code or 0


def test_json_is_all_there_is_on_stdout(capsys):
    def command(as_json: output.JsonFlag = False) -> None:
        print("a library talks")
        output.note("half of it")
        warnings.simplefilter("default")  # pytest makes errors of them
        warnings.warn("a matter", UserWarning, stacklevel=1)
        output.show(Numbers(), as_json=as_json, render=lambda out: out.print("12 bytes"))

    assert run(command, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"nbytes": 12, "loss": None, "rows": [[1.5, None]], "3": "[bold]"}
    assert shown.err.splitlines() == ["a library talks", "half of it", "warning: a matter"]
    assert run(command) == 0
    assert capsys.readouterr().out == "12 bytes\n"


def test_a_table_keeps_brackets_and_aligns_numbers(capsys):
    made = output.table(["weights", "bytes"], [["[0].weight", "5"], ["head", "1,024"]])
    output.show(Numbers(), as_json=False, render=lambda out: out.print(made))
    lines = capsys.readouterr().out.splitlines()
    assert any("[0].weight" in line and line.rstrip(" │").endswith("    5") for line in lines)
    assert all(len(line) < 120 for line in lines)


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (CheckpointError("a.safetensors: cut short"), 1, "error: a.safetensors: cut short"),
        (FileNotFoundError(2, "No such file or directory", "gone"), 1, "error: gone: No such file or directory"),
        (OSError("the Hub answered 404"), 1, "error: the Hub answered 404"),
        (ImportError("pip install matplotlib"), 1, "error: pip install matplotlib"),
        (torch.OutOfMemoryError("2 GiB"), 1, "error: 2 GiB"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_stops_a_command_is_one_message(raised, code, said, capsys):
    def command() -> None:
        raise raised

    assert run(command) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{said}\n")


def test_a_bug_keeps_its_traceback():
    def command() -> None:
        raise AssertionError("a bug")

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(output.answers(command))
    with pytest.raises(AssertionError, match="a bug"):
        app(args=[])


@pytest.mark.parametrize("arguments, code", [([], 2), (["nonsense"], 2), (["--help"], 0), (["--version"], 0)], ids=str)
def test_the_commands_of_the_app(arguments, code, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert (stopped.value.code or 0) == code
    shown = capsys.readouterr()
    assert "bigq" in (shown.out + shown.err)


def test_python_m_bigq_is_the_command():
    ran = subprocess.run([sys.executable, "-m", "bigq", "--version"], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.split()[0]) == (0, "bigq")
