"""Slices: what a quantized module keeps is what the whole weight holds there, bit for bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bigq import FP4, NF4, Int8, QuantizationConfig, UnsupportedError, load_and_quantize_model, save_quantized
from bigq.formats import decode_quant_state
from bigq.model.placeholders import hold_placeholders
from bigq.weight.slices import is_sliced, keep_ranges, range_of_rank

FORMATS = {
    "nf4": NF4(),
    "nf4-double-quant": NF4(block_size=32, double_quant=True),
    "fp4": FP4(block_size=128),
    "int8": Int8(),
}
N, K = 12, 320


@pytest.fixture(params=FORMATS)
def linear(request):
    torch.manual_seed(0)
    config = QuantizationConfig(FORMATS[request.param], skip_modules=[])
    return load_and_quantize_model(nn.Sequential(nn.Linear(K, N)), None, config, "cpu")[0]


def described(module):
    return decode_quant_state(module.quant_state, "here")["weight"]


def test_rows_are_those_of_the_whole_weight(linear):
    whole, bias = linear.dequantize(), linear.bias.detach().clone()
    scales = linear.absmax.clone()
    keep_ranges(linear, "weight", -2, [(8, 10), (1, 4)], ["bias"])
    kept = [8, 9, 1, 2, 3]
    assert torch.equal(linear.dequantize(), whole[kept])
    assert torch.equal(linear.absmax, scales[kept])
    assert torch.equal(linear.bias, bias[kept])
    assert (linear.out_features, linear.in_features, described(linear).shape) == (5, K, (5, K))
    x = torch.randn(3, K)
    expected = x @ whole[kept].T + bias[kept]
    assert ((linear(x) - expected).norm() / expected.norm()) < (0.02 if linear.format.name == "int8" else 1e-6)


def test_columns_are_those_of_the_whole_weight(linear):
    """Also the last block, which is short in blocks of 128; and int8's scales stay those of whole rows."""
    whole = linear.dequantize()
    start = 256 if linear.format.column_group == 128 else 192
    keep_ranges(linear, "weight", -1, [(start, K)], [])
    assert torch.equal(linear.dequantize(), whole[:, start:])
    assert (linear.out_features, linear.in_features) == (N, K - start)
    assert len(linear.bias) == N
    x = torch.randn(3, K - start)
    expected = x @ whole[:, start:].T + linear.bias
    assert ((linear(x) - expected).norm() / expected.norm()) < (0.02 if linear.format.name == "int8" else 1e-6)


def test_double_quantization_ends_with_the_slice(linear):
    keep_ranges(linear, "weight", -2, [(0, 6)], ["bias"])
    expected = {"weight_packed", "weight_absmax", "quant_state", "bias"}
    assert {name for name, _ in linear.named_parameters()} == expected
    assert described(linear).format.describe().get("double_quant", False) is False
    assert {p.untyped_storage().nbytes() for p in linear.parameters()} == {p.nbytes for p in linear.parameters()}


def test_matrices_of_a_stack(linear):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 8, 64)), nn.Parameter(torch.randn(5, 8))

    if linear.format.column_group == 128:
        pytest.skip("one format of blocks is enough")
    config = QuantizationConfig(linear.format, also_quantize=["0.weight"])
    experts = load_and_quantize_model(nn.Sequential(Experts()), None, config, "cpu")[0]
    whole, bias = experts.weight.dequantize(), experts.bias.detach().clone()
    keep_ranges(experts, "weight", 0, [(2, 5)], ["bias"])
    assert torch.equal(experts.weight.dequantize(), whole[2:])
    assert torch.equal(experts.bias, bias[2:])
    keep_ranges(experts, "weight", -2, [(0, 2), (4, 6)], ["bias"])
    assert torch.equal(experts.weight.dequantize(), whole[2:, [0, 1, 4, 5]])
    assert torch.equal(experts.bias, bias[2:, [0, 1, 4, 5]])


def test_a_state_dict_has_no_slice_and_a_load_says_so(linear):
    model = nn.Sequential(linear)
    hold_placeholders(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not is_sliced(linear)
    keep_ranges(linear, "weight", -2, [(0, 6)], ["bias"])
    assert is_sliced(linear)
    assert model.state_dict() == {}
    assert pickle.loads(pickle.dumps(model)).state_dict() == {}
    assert copy.deepcopy(model)[0].out_features == 6
    with pytest.raises(RuntimeError, match=r"of shape \[12, 320\], the model"):
        model.load_state_dict(state)


def test_a_slice_is_not_saved_as_a_weight(linear, tmp_path):
    keep_ranges(linear, "weight", -2, [(0, 6)], ["bias"])
    with pytest.raises(UnsupportedError, match=r"1 modules \(0 is the first\) are slices"):
        save_quantized(nn.Sequential(linear), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weight_without_memory_is_not_cut(linear):
    linear.to("meta")
    with pytest.raises(UnsupportedError, match="offloaded or on meta"):
        keep_ranges(linear, "weight", -2, [(0, 6)], ["bias"])


@pytest.mark.parametrize("size, world", [(12, 1), (12, 4), (13, 3), (5, 3)])
def test_ranges_are_those_of_torch(size, world):
    parts = torch.arange(size).chunk(world)
    for rank in range(world):
        start, stop = range_of_rank(size, rank, world)
        assert parts[rank].tolist() == list(range(start, stop))


@pytest.mark.parametrize("size, world", [(3, 4), (6, 5)])
def test_a_process_without_any_is_refused_in_every_process(size, world):
    for rank in range(world):
        with pytest.raises(UnsupportedError, match=f"too few for {world} processes"):
            range_of_rank(size, rank, world)
