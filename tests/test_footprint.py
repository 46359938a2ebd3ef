"""memory_footprint: exact bytes, by device and kind."""

import torch
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model, memory_footprint, num_parameters


def test_counts_every_byte_once(tiny, checkpoint, empty):
    model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
    device = str(next(model.parameters()).device)
    kinds = memory_footprint(model).nbytes[device]
    packed = 3 * (216 * 36 + 72 * 108)
    # up is [216, 72]: 2 blocks a row; down is [72, 216]: 4; and each layer has a description
    scales = 3 * (4 * (216 * 2 + 72 * 4) + 2 * 256)
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


class TestNumParameters:
    def test_a_quantized_weight_counts_as_the_numbers_it_stands_for(self, tiny, checkpoint, empty, config):
        plain = sum(parameter.numel() for parameter in tiny().parameters())
        assert num_parameters(tiny()) == plain
        model = load_and_quantize_model(empty(tiny), checkpoint, config)
        assert num_parameters(model) == plain
        assert sum(parameter.numel() for parameter in model.parameters()) != plain, "what torch counts"

    def test_frozen_ones_are_left_out_on_request(self, tiny, checkpoint, empty):
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
        quantized = 3 * 2 * 216 * 72
        assert num_parameters(model, only_trainable=True) == num_parameters(tiny()) - quantized
        model.embed.weight.requires_grad_(False)
        assert num_parameters(model, only_trainable=True) == num_parameters(tiny()) - quantized - 50 * 72

    def test_ties_count_once(self, tiny):
        assert num_parameters(tiny()) - num_parameters(tiny(tied=True)) == 50 * 72

    def test_a_tied_quantized_weight_counts_once(self, tiny):
        model = load_and_quantize_model(
            tiny(tied=True), None, QuantizationConfig("nf4", also_quantize=["embed.weight"]), "cpu"
        )
        assert num_parameters(model) == num_parameters(tiny(tied=True))
