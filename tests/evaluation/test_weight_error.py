"""weight_errors: each group's error, by the formula on whole tensors; what does not fit together is refused."""

import pytest
import torch
from torch import nn

import bigq
from bigq.errors import CheckpointError
from bigq.evaluation import weight_error
from bigq.evaluation.weight_error import group_of, weight_errors
from bigq.model.in_place import ModelTensors


class Blocks(nn.Module):
    """Two alike blocks, a stack of matrices, an embedding that is tied to the head, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 96)
        self.layers = nn.ModuleList(nn.Linear(96, 40) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(3, 8, 96))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(96, 10, bias=False)
        self.head.weight = self.embed.weight


def _pair(config):
    source, model = Blocks(), Blocks()
    model.load_state_dict(source.state_dict())
    return source, bigq.load_and_quantize_model(model, None, config, device_map="cpu")


def _relative(pairs):
    difference = sum((after.double() - before.double()).square().sum() for before, after in pairs)
    return (difference / sum(before.double().square().sum() for before, _ in pairs)).sqrt().item()


def test_the_error_of_a_group_is_that_of_all_its_tensors(monkeypatch):
    config = bigq.QuantizationConfig("nf4", also_quantize=["experts"], rules={"layers.1": "int8"})
    source, model = _pair(config)
    monkeypatch.setattr(weight_error, "_CHUNK_NUMEL", 7 * 96)  # several steps, the last of them shorter
    groups = {(group.group, group.format): group for group in weight_errors(ModelTensors(source), model)}
    layers = [(before.weight, after.weight) for before, after in zip(source.layers, model.layers, strict=True)]
    expected = {
        ("layers.*.weight", "nf4"): layers[:1],
        ("layers.*.weight", "int8"): layers[1:],
        ("experts", "nf4"): [(source.experts, model.experts)],
    }
    for key, pairs in expected.items():
        group = groups.pop(key)
        assert group.quantized
        assert group.error == group.worst_error == pytest.approx(_relative(pairs), rel=1e-5)
        assert group.source_norm == pytest.approx(pairs[0][0].double().norm().item(), rel=1e-6)
        assert group.source_nbytes == 4 * pairs[0][0].numel()
    assert 0.002 < _relative(layers[1:]) < 0.02 < _relative(layers[:1]) < 0.12
    assert {key: (group.weights, group.error, group.quantized) for key, group in groups.items()} == {
        ("embed.weight", "float32"): (1, 0.0, False),  # tied: once
        ("layers.*.bias", "float32"): (2, 0.0, False),
        ("scale", "float32"): (1, 0.0, False),
    }


def test_alike_layers_are_one_group_with_the_worst_of_them():
    source, model = _pair(bigq.QuantizationConfig("nf4", block_size=32, skip_modules=["head"]))
    with torch.no_grad():
        source.layers[1].weight.mul_(2)  # as if layer 1 had been damaged: half of it is missing
    group = next(group for group in weight_errors(ModelTensors(source), model) if group.quantized)
    pairs = [(before.weight, after.weight) for before, after in zip(source.layers, model.layers, strict=True)]
    assert (group.group, group.format, group.weights) == ("layers.*.weight", "nf4 block_size=32", 2)
    assert group.error == pytest.approx(_relative(pairs), rel=1e-5)
    assert (group.worst, group.worst_error) == ("layers.1.weight", pytest.approx(_relative(pairs[1:]), rel=1e-5))
    assert group.nbytes == 2 * (40 * 48 + 4 * 40 * 3)  # codes, and a scale for each 32 of 96


def test_a_transposed_weight():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    source, model = nn.Sequential(conv(32, 64)), nn.Sequential(conv(32, 64))
    model.load_state_dict(source.state_dict())
    bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4", skip_defaults=False), device_map="cpu")
    group = next(group for group in weight_errors(ModelTensors(source), model) if group.quantized)
    assert group.error == pytest.approx(_relative([(source[0].weight, model[0].weight)]), rel=1e-5)


def test_a_cast_has_an_error_too():
    source, model = _pair(bigq.QuantizationConfig("nf4", dtype="bf16"))
    groups = {group.group: group for group in weight_errors(ModelTensors(source), model)}
    assert groups["embed.weight"].format == "bfloat16"
    assert groups["embed.weight"].error == pytest.approx(
        _relative([(source.embed.weight, source.embed.weight.bfloat16())]), rel=1e-5
    )


def test_zeros_that_became_numbers_are_infinitely_far():
    source, model = _pair(bigq.QuantizationConfig("nf4"))
    with torch.no_grad():
        source.layers[0].bias.zero_()
        source.layers[1].bias.zero_()
        model.layers[0].bias.fill_(1)
    errors = {group.group: group.error for group in weight_errors(ModelTensors(source), model)}
    assert errors["layers.*.bias"] == float("inf")


def test_another_models_source_is_refused():
    source, model = _pair(bigq.QuantizationConfig("nf4"))
    other = Blocks()
    other.layers[0] = nn.Linear(96, 41)
    with pytest.raises(CheckpointError, match=r"'layers.0.weight' .* is \[41, 96\], and \[40, 96\] in the quantized"):
        weight_errors(ModelTensors(other), model)
    del source.scale
    with pytest.raises(CheckpointError, match="lacks 1 tensors of the quantized model: scale"):
        weight_errors(ModelTensors(source), model)


def test_numbers_in_names_make_no_groups():
    assert group_of("model.layers.12.mlp.experts.3.w1.weight") == "model.layers.*.mlp.experts.*.w1.weight"
