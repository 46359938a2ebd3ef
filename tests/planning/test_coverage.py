"""The share of a model's weights that is quantized, and the warning where most of them are left."""

import pytest
import torch
from torch import nn

import bigq


class OwnExperts(nn.Module):
    def __init__(self, number=64):
        super().__init__()
        self.router = nn.Linear(64, number)
        self.up = nn.Parameter(torch.randn(number, 128, 64))
        self.down = nn.Parameter(torch.randn(number, 64, 128))


def loaded(model, **settings):
    return bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4", **settings), device_map="cpu")


def test_most_weights_left_without_a_reason_are_named():
    with pytest.warns(
        UserWarning, match=r"2,097,152 numbers of 4 weights stay.*8,192 are quantized.*: 0.up, 0.down, 1.up, 1.down$"
    ):
        loaded(nn.Sequential(OwnExperts(), OwnExperts()), skip_defaults=False)


@pytest.mark.parametrize(
    "settings",
    [{"also_quantize": ["up", "down"]}, {"skip_modules": ["up", "down"]}],
    ids=["quantized", "skipped"],
)
def test_weights_that_are_named_are_no_reason_to_warn(settings):
    model = loaded(nn.Sequential(OwnExperts(), nn.Linear(64, 64), nn.Linear(64, 64)), **settings)
    experts, linears = 2 * 64 * 128 * 64, 64 * 64
    quantized = linears + (experts if "also_quantize" in settings else 0)
    share = quantized / (experts + linears + 64 + 2 * 64 * 65)  # the router is kept, and the last linear, the head
    assert model.quantization_report.quantized_share == pytest.approx(share)
    assert f"{100 * share:.1f} % of the numbers" in model.quantization_report.table()


def test_modules_of_torch_are_no_reason_to_warn():
    loaded(nn.Sequential(nn.Conv2d(64, 64, 3), nn.Embedding(200_000, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
