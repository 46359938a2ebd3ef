"""`bigq doctor`: a healthy machine, and one whose self-test fails."""

import json

import pytest

from bigq.cli.app import main
from bigq.formats import NF4
from bigq.measuring.environment import installed_version
from command_page import commands


def _run(capsys, *arguments):
    """(exit code, stdout, stderr) of `bigq doctor`."""
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_the_lines_of_the_page_run(tmp_path, capsys):
    lines = commands("doctor")
    assert len(lines) == 2
    for arguments in lines:
        code, out, err = _run(capsys, *(str(tmp_path) if a == "/mnt/nvme" else a for a in arguments[1:]))
        assert code == 0, err
    assert json.loads(out)["rates"][-1]["bytes_per_s"] > 0
    assert not any(tmp_path.iterdir())


def test_a_machine_that_is_right(capsys):
    code, out, _ = _run(capsys, "--device", "cpu")
    assert code == 0
    for said in (installed_version("torch"), "self-test: 24 of 24 checks passed", "reference", "free host memory"):
        assert said in out


def test_a_self_test_that_fails_exits_with_1(capsys, monkeypatch):
    original = NF4.linear
    monkeypatch.setattr(NF4, "linear", lambda self, *args: original(self, *args) * 1.1)
    code, out, _ = _run(capsys, "--device", "cpu", "--json")
    found = json.loads(out)
    assert (code, found["is_right"]) == (1, False)
    failed = [check["what"] for check in found["checks"] if not check["passed"]]
    assert len(failed) == 8  # nf4 with and without double_quant, two widths, two dtypes
    assert all(what.startswith("nf4") and "products" in what for what in failed)
    code, out, _ = _run(capsys, "--device", "cpu")
    assert code == 1
    assert "self-test: 16 of 24 checks passed" in out
    assert "problem: self-test: nf4, K = 512: products in float32: 1 tokens: the error is" in out


def test_a_folder_that_is_not_there(tmp_path, capsys):
    code, out, err = _run(capsys, "--device", "cpu", "--folder", tmp_path / "missing")
    assert (code, out) == (1, "")
    assert "missing" in err
