"""`bigq bench`: its commands on a CPU, the JSON that it writes, and what it says of wrong arguments."""

import json

import pytest
import typer

from bigq.benchmarks.formats import BENCH_FORMATS
from bigq.cli import bench
from bigq.cli.app import main
from command_page import commands


def _run(capsys, *arguments):
    """(exit code, stdout, stderr) of `bigq bench`."""
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_shapes():
    assert bench.parse_shapes("4096x1024,8x16") == [(4096, 1024), (8, 16)]
    for text in ("", "4096", "4096x", "4096x1x2", "axb", "0x5", "4x-1"):
        with pytest.raises(typer.BadParameter, match="expected N x K like"):
            bench.parse_shapes(text)


def test_linears_and_two_runs_of_them(tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        code, out, err = _run(
            capsys,
            "linears",
            "--shapes",
            "64x128",
            "--tokens",
            "1",
            "--format",
            "nf4",
            "--device",
            "cpu",
            "--out",
            file,
        )
        assert (code, f"wrote {file}" in err) == (0, True)
        assert "64x128" in out
    code, out, _ = _run(capsys, "compare", *files, "--json")
    changes = json.loads(out)["changes"]
    assert [change["what"]["format"] for change in changes] == ["float32", "nf4"]
    read = [json.loads(file.read_text())["rows"][1]["readings"]["us"]["value"] for file in files]
    assert changes[1]["ratio"] == pytest.approx(read[1] / read[0])
    code, out, _ = _run(capsys, "compare", *files)
    assert "B / A" in out


def test_the_lines_of_the_page_run(tmp_path, capsys, monkeypatch):
    smaller = {"8b": "tiny", "16": "0.002", "/mnt/nvme": str(tmp_path), "4096x4096": "64x64", "1,16": "1"}
    monkeypatch.chdir(tmp_path)
    lines = commands("bench")
    assert len(lines) == 6
    for arguments in lines:
        code, out, err = _run(capsys, *(smaller.get(argument, argument) for argument in arguments[1:]))
        assert (code, bool(out)) == (0, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.json", "before.json"]


@pytest.mark.parametrize("command", ["model", "offload"])
def test_json(command, tmp_path, capsys):
    code, out, _ = _run(
        capsys, command, "--tokens", "1", "--format", "int8", "--device", "cpu", "--folder", tmp_path, "--json"
    )
    found = json.loads(out)
    assert (code, found["benchmark"]) == (0, command)
    assert found["rows"]
    assert found["environment"]["versions"]["torch"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["linears", "--format", "nf5"], 2, f"'nf5' is no format; expected one of {', '.join(BENCH_FORMATS)}"),
        (["linears", "--tokens", "x"], 2, "no list of positive numbers"),
        (["linears", "--shapes", "4"], 2, "no list of shapes"),
        (["linears", "--out", "missing/a.json"], 1, "missing/a.json: No such file"),
        (["model", "--size", "9t"], 2, "'9t' is no size"),
        (["loading", "--size", "-1"], 2, "expected a positive number"),
        (["loading", "--folder", "missing"], 1, "No such file"),
        (["offload", "--format", "nf5"], 2, "'nf5' is no format"),
        (["compare", "a.json", "b.json"], 1, "a.json: No such file"),
        (["hats"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, out, err = _run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert said in " ".join(err.replace("│", " ").split())
