"""`bigq bench`: its arguments, its arithmetic, and its table on a GPU."""

import re

import pytest
import torch
import typer

from bigq.cli import bench
from bigq.cli.app import main

MACHINE = bench.Machine(bytes_per_s=4e12, operations_per_s=8e14)


def test_shapes_and_tokens():
    assert bench.parse_shapes("4096x1024,8x16") == [(4096, 1024), (8, 16)]
    assert bench.parse_tokens("1,16") == [1, 16]
    assert len(bench.parse_shapes(bench.SHAPES)) == 4


@pytest.mark.parametrize("text", ["", "4096", "4096x", "4096x1x2", "axb", "0x5", "4x-1"])
def test_what_is_no_shape(text):
    with pytest.raises(typer.BadParameter, match="expected N x K like"):
        bench.parse_shapes(text)


@pytest.mark.parametrize("text", ["", "1,", "0", "x", "1.5"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(typer.BadParameter, match="expected one like 1,16,512"):
        bench.parse_tokens(text)


def test_the_floor_is_the_slower_of_moving_and_multiplying():
    assert MACHINE.floor_us(8_000_000, 0) == pytest.approx(2.0)
    assert MACHINE.floor_us(8_000_000, 8_000_000_000) == pytest.approx(10.0)


def test_a_row_counts_every_byte_once():
    # 4096 * 4096 / 2 codes, 4 bytes for each 64 of them, and 2 bytes for each of 8192 activations
    nbytes = 8388608 + 1048576 + 16384
    cells = dict(zip(bench.HEADER, bench.row("nf4", 4096, 4096, 1, 10.0, 15.0, MACHINE), strict=True))
    assert cells["GB/s"] == f"{nbytes / 1e4:.0f}" == "945"
    assert cells["of the floor"] == "24%"  # 9.45 MB at 4 TB/s: 2.36 us
    assert (cells["us"], cells["bf16 us"], cells["times bf16's speed"]) == ("10.0", "15.0", "1.50")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench"])
    assert stopped.value.code == 1
    assert "error: bench needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--format", "nf5"], ["--tokens", "x"]], ids=str)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert "Usage: bigq bench" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_table(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--shapes", "512x1024", "--tokens", "1,300"])
    assert not stopped.value.code
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 512 x 1024")]
    assert len(rows) == 2 * len(bench.FORMATS)
    assert all(re.search(r"\| \d+\.\d \| \d+ \| \d+% \|", line) for line in rows)
