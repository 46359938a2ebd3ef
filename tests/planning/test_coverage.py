"""The share of a model's weights that is quantized, and the warning where most of them are left."""

import pytest
import torch
from torch import nn

import bigq
from mixtures import mixture


class OwnExperts(nn.Module):
    def __init__(self, number=64):
        super().__init__()
        self.router = nn.Linear(64, number)
        self.up = nn.Parameter(torch.randn(number, 128, 64))
        self.down = nn.Parameter(torch.randn(number, 64, 128))


def loaded(model, **settings):
    return bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4", **settings), device_map="cpu")


@pytest.mark.parametrize("number, left", [(64, "2,097,152"), (3, "98,304")])
def test_most_weights_left_without_a_reason_are_named(number, left):
    words = rf"{left} numbers of 4 weights stay.*{2 * 64 * number:,} are quantized.*: 0.up, 0.down, 1.up, 1.down$"
    with pytest.warns(UserWarning, match=words):
        loaded(nn.Sequential(OwnExperts(number), OwnExperts(number)), skip_defaults=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"also_quantize": ["up", "down"]},
        {"skip_modules": ["up", "down"]},
        {"keep_in_fp32_modules": ["0"]},
        {"rules": {"0.up": None, "re:.*down": None}},
    ],
    ids=["quantized", "skipped", "float32", "rules"],
)
def test_weights_that_are_named_are_no_reason_to_warn(settings):
    model = loaded(nn.Sequential(OwnExperts(), nn.Linear(64, 64), nn.Linear(64, 64)), **settings)
    experts, linears = 2 * 64 * 128 * 64, 64 * 64
    quantized = linears + (experts if "also_quantize" in settings else 0)
    share = quantized / (experts + linears + 64 + 2 * 64 * 65)  # the router is kept, and the last linear, the head
    assert model.quantization_report.quantized_share == pytest.approx(share)
    assert f"{100 * share:.1f} % of the numbers" in model.quantization_report.table()


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return 8 * super().forward(ids)


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_modules_of_torch_are_no_reason_to_warn(kind):
    loaded(nn.Sequential(nn.Conv2d(64, 64, 3), kind(200_000, 8), nn.Linear(8, 8), nn.Linear(8, 8)))


class ListedExperts(nn.ModuleList):
    def __init__(self):
        super().__init__([nn.Linear(64, 64)])
        self.stacks = nn.ParameterList([torch.randn(4, 64, 64)])


def test_containers_of_torch_hold_weights_that_bigq_does_not_know():
    with pytest.warns(UserWarning, match=r"16,384 numbers of 1 weights stay.*: 0.stacks.0$"):
        loaded(nn.Sequential(ListedExperts(), nn.Linear(64, 64)))


@pytest.mark.filterwarnings("ignore:.*stay as they are, and .* are quantized. by default")
def test_a_folder_of_bigq_is_no_reason_to_warn_again(tmp_path):
    bigq.save_quantized(loaded(nn.Sequential(OwnExperts(3), OwnExperts(3)), skip_defaults=False), tmp_path)
    bigq.load_and_quantize_model(nn.Sequential(OwnExperts(3), OwnExperts(3)), tmp_path, None, device_map="cpu")


def test_floats_that_bitsandbytes_has_left_are_named(tmp_path):
    """transformers' experts, which bitsandbytes does not quantize; a reader of its folders quantizes none either."""
    model = mixture("MixtralForCausalLM")
    config = bigq.QuantizationConfig("nf4", skip_modules=["experts"])
    bigq.load_and_quantize_model(model, None, config, device_map="cpu")
    bigq.save_quantized(model, tmp_path, layout="bitsandbytes")
    words = r"the checkpoint holds them so.*load the original weights.*: model.layers.0.mlp.experts.gate_up_proj"
    with pytest.warns(UserWarning, match=words):
        bigq.load_and_quantize_model(mixture("MixtralForCausalLM"), tmp_path, None, device_map="cpu")
