"""memory_footprint: exact bytes, by device and kind."""

import torch
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model, memory_footprint


def test_counts_every_byte_once(tiny, checkpoint, empty):
    model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
    device = str(next(model.parameters()).device)
    kinds = memory_footprint(model).nbytes[device]
    packed = 3 * (216 * 36 + 72 * 108)
    # up is [216, 72]: 2 blocks a row; down is [72, 216]: 4; and each layer has a code table and a description
    scales = 3 * (4 * (216 * 2 + 72 * 4) + 2 * (64 + 256))
    kept = 4 * (50 * 72 * 2 + 72 + 3 * (72 * 2 + 216) + 72 + 72) + 8
    assert kinds == {"packed": packed, "scales": scales, "kept": kept}
    assert memory_footprint(model).total_nbytes == packed + scales + kept
    assert memory_footprint(model).total_nbytes == sum(
        t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())
    )


def test_ties_count_once(tiny):
    assert memory_footprint(tiny()).total_nbytes - memory_footprint(tiny(tied=True)).total_nbytes == 50 * 72 * 4


def test_devices(tiny, checkpoint, empty, tmp_path):
    model = load_and_quantize_model(
        empty(tiny),
        checkpoint,
        QuantizationConfig("int8"),
        {"": "cpu", "blocks.0": "disk"},
        offload_folder=tmp_path / "offload",
    )
    found = memory_footprint(model).nbytes
    assert set(found) == {"cpu", "disk"}
    assert found["disk"]["packed"] == 2 * 72 * 216
    assert memory_footprint(empty(tiny)).nbytes.keys() == {"meta", "cpu"}  # parameters and buffers


def test_table():
    table = memory_footprint(nn.Linear(1000, 1000, bias=False).to(torch.float32)).table()
    assert table.splitlines()[0].split() == ["MB", "packed", "scales", "kept", "all"]
    assert table.splitlines()[1].split() == ["cpu", "0.000", "0.000", "4.000", "4.000"]
    assert table.splitlines()[2].split()[0] == "total"
