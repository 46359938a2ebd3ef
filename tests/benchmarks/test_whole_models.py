"""bench_model, bench_loading and bench_offload: their rows on a CPU, their arithmetic, and that they leave nothing."""

from collections import namedtuple

import pytest
import torch

from bigq.benchmarks import scratch
from bigq.benchmarks.llama import LlamaShape
from bigq.benchmarks.loading import _shape, bench_loading
from bigq.benchmarks.model import bench_model
from bigq.benchmarks.offload import bench_offload
from bigq.errors import PlacementError

SHAPE = LlamaShape(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, vocabulary=64)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
BLOCK = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # numbers of its linears


def test_a_model_by_format(tmp_path):
    found = bench_model(CPU, size=SHAPE, formats=["nf4", "int8"], tokens=[1, 2], folder=tmp_path)
    assert [row.what["format"] for row in found.rows] == ["float32", "nf4", "int8"]
    assert [*found.rows[1].readings] == ["load s", "1 tokens ms", "2 tokens ms", "MB"]
    sizes = [row.readings["MB"].value * 1e6 for row in found.rows]
    kept = 4 * (2 * 64 * 64 + 5 * 64)  # embedding, head and norms
    assert sizes[0] == kept + 4 * 2 * BLOCK
    assert sizes[1] == kept + 2 * (BLOCK // 2 + 4 * BLOCK // 64 + 7 * 256)  # codes, scales and a description each
    assert not any(tmp_path.iterdir())


def test_cold_and_warm_loads(tmp_path):
    found = bench_loading(CPU, nbytes=2_000_000, formats=["int8"], folder=tmp_path)
    assert [tuple(row.what.values()) for row in found.rows] == [
        (name, cache) for name in ("bfloat16", "int8") for cache in ("cold", "warm")
    ]
    for row in found.rows:
        assert row.derived["GB/s"] == pytest.approx(found.settings["checkpoint_nbytes"] / row.readings["s"].value / 1e9)
    assert abs(found.settings["checkpoint_nbytes"] / 2e6 - 1) < 0.5
    assert not any(tmp_path.iterdir())


def test_most_of_a_checkpoint_is_blocks():
    for nbytes in (20_000_000, 2_000_000_000, 16_000_000_000):
        shape = _shape(nbytes, torch.bfloat16)
        assert 4 * shape.vocabulary * shape.hidden < nbytes / 2
        assert abs(shape.nbytes(torch.bfloat16) / nbytes - 1) < 0.1
    assert shape.hidden == 4096


def test_offloaded_blocks_and_their_bytes(tmp_path):
    found = bench_offload(CPU, size=SHAPE, tokens=[1], folder=tmp_path)
    assert [tuple(row.what.values()) for row in found.rows] == [
        ("resident", "quantized", 1),
        ("disk", "quantized", 1),
        ("disk", "preserve", 1),
    ]
    preserved = found.rows[2].derived
    assert preserved["MB"] * 1e6 == 4 * 2 * (BLOCK + 2 * 64)
    assert preserved["floor ms"] == pytest.approx(1e9 * preserved["MB"] / found.settings["disk_bytes_per_s"])
    assert found.rows[1].derived["MB"] == found.rows[0].derived["MB"] < preserved["MB"] / 4
    assert not any(tmp_path.iterdir())


def test_a_full_drive_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda folder: usage(1_000_000))
    with pytest.raises(PlacementError, match=r"0.02 GB does not fit into .* has 0.00 GB left: pass another --folder"):
        bench_loading(CPU, folder=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
def test_on_a_gpu():
    model = bench_model(GPU, size=SHAPE, formats=["nf4"], tokens=[1])
    assert "graph 1 token ms" in model.rows[1].readings
    assert "peak load MB" in model.rows[1].readings
    offload = bench_offload(GPU, size=SHAPE, tokens=[1])
    assert {row.what["blocks on"] for row in offload.rows} == {"resident", "cpu", "disk"}
    loading = bench_loading(GPU, nbytes=20_000_000, formats=["nf4"])
    assert len(loading.rows) == 4
