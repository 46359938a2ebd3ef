"""bench_linears: which bytes and operations it counts, and its rows."""

import pytest
import torch

from bigq.benchmarks import linears
from bigq.benchmarks.formats import BENCH_FORMATS
from bigq.measuring.reading import Reading

FLOOR = linears.Floor(bytes_per_s=4e12, operations_per_s=8e14)


def test_the_floor_is_the_slower_of_moving_and_multiplying():
    assert FLOOR.us(8_000_000, 0) == pytest.approx(2.0)
    assert FLOOR.us(8_000_000, 8_000_000_000) == pytest.approx(10.0)


def test_a_row_counts_every_byte_once():
    # 4096 * 4096 / 2 codes, 4 bytes for each 64 of them, and 2 bytes for each of 8192 activations
    nbytes = 8388608 + 1048576 + 16384
    found, base = Reading(value=10.0, spread=0.1), Reading(value=15.0)
    row = linears._row(("nf4", BENCH_FORMATS["nf4"]), torch.bfloat16, (4096, 4096), 1, found, base, FLOOR)
    assert row.what == {"shape": "4096x4096", "tokens": 1, "format": "nf4"}
    assert row.readings == {"us": found}
    assert row.derived["GB/s"] == pytest.approx(nbytes / 1e4)
    assert row.derived["of the floor"] == pytest.approx(nbytes / 4e12 * 1e6 / 10)
    assert row.derived["times float's speed"] == 1.5


def test_every_format_beside_float():
    found = linears.bench_linears(torch.device("cpu"), shapes=[(64, 128)], tokens=[1, 3])
    cases = [(row.what["tokens"], row.what["format"]) for row in found.rows]
    assert cases == [(m, name) for m in (1, 3) for name in ("float32", *BENCH_FORMATS)]
    assert all(row.readings["us"].value > 0 for row in found.rows)
    assert [row.derived["times float's speed"] for row in found.rows[:1]] == [1.0]


@pytest.mark.gpu
def test_on_a_gpu_in_a_graph():
    found = linears.bench_linears(torch.device("cuda"), shapes=[(512, 1024)], tokens=[1, 300], formats=["nf4", "int8"])
    assert found.settings["timing"] == "CUDA graph"
    assert [row.what["format"] for row in found.rows] == ["bfloat16", "nf4", "int8"] * 2
    assert all(0 < row.derived["of the floor"] < 2 for row in found.rows)
