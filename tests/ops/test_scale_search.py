"""The search for scales: never worse than absmax where the inputs are large, right at every end of float32."""

import math

import pytest
import torch

from bigq.ops import reference
from bigq.ops.code_tables import CODES, FP4_MAGNITUDE_BOUNDARIES, NF4_BOUNDARIES
from bigq.ops.scale_search import _bins, _code_values

QUANT_TYPES = ["nf4", "fp4"]


def searched(weight, importance, quant_type, block_size):
    """(packed, scales) of a weight."""
    scales = reference.search_scales_4bit(weight, importance, quant_type, block_size)
    return reference.encode_scaled_4bit(weight, scales, quant_type, block_size), scales


def block_errors(weight, importance, packed, scales, quant_type, block_size):
    """The weighted squared error of each block, float64 [N, B]."""
    rows, columns = weight.shape
    decoded = reference.dequantize_4bit(packed, scales, quant_type, block_size, columns, torch.float32)
    errors = importance.double() * (decoded.double() - weight.double()) ** 2
    padded = torch.nn.functional.pad(errors, (0, -columns % block_size))
    return padded.view(rows, -1, block_size).sum(dim=2)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_no_block_has_a_larger_weighted_error_than_with_absmax(quant_type):
    for block_size, columns in ((32, 320), (64, 300), (4096, 5000)):
        for spread in (0, 2, 8):  # of the importance: up to the 1e8 that the clamp of moments allows
            weight = torch.distributions.StudentT(3.0).sample((40, columns))
            importance = torch.rand(columns) * 10.0 ** (torch.rand(columns) * spread - spread / 2) + 1e-4
            args = (quant_type, block_size)
            found = block_errors(weight, importance, *searched(weight, importance, *args), *args)
            absmax = block_errors(weight, importance, *reference.quantize_4bit(weight, *args), *args)
            assert (found <= absmax * (1 + 1e-5)).all()
            assert found.sum() < 0.95 * absmax.sum()


def test_errors_of_a_normal_weight_are_those_of_the_literature_of_the_search():
    """Relative error of NF4 in blocks of 64: .0920 with absmax, .0836 with 4 factors, 2 signs and one more step."""
    weight, importance = torch.randn(256, 4096), torch.ones(4096)
    for quant_type, low, high in (("nf4", 0.0830, 0.0842), ("fp4", 0.1125, 0.1145)):
        args = (quant_type, 64)
        error = block_errors(weight, importance, *searched(weight, importance, *args), *args).sum()
        assert low < (error / weight.double().square().sum()).sqrt() < high
    scales = reference.search_scales_4bit(weight, importance, "nf4", 64)
    assert 0.45 < (scales < 0).float().mean() < 0.55
    assert (reference.search_scales_4bit(weight, importance, "fp4", 64) > 0).all()


def test_by_hand():
    """Two numbers a block matter: what 0.5 and 1.0 become depends on which of them the inputs meet."""
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([0.5, 1.0])
    for important, exact in ((0, 0.5), (1, 1.0)):
        importance = torch.full((32,), 1e-4)
        importance[important] = 1e4
        packed, scales = searched(weight, importance, "nf4", 32)
        decoded = reference.dequantize_4bit(packed, scales, "nf4", 32, 32, torch.float32)
        assert decoded[0, important].item() == pytest.approx(exact, rel=1e-6)


def test_a_tie_keeps_the_positive_scale():
    weight = torch.zeros(2, 64)
    weight[0, :2] = torch.tensor([1.0, -1.0])  # the values of NF4 at its ends are symmetric
    weight[1, 0] = -1.0
    assert reference.search_scales_4bit(weight, torch.ones(64), "nf4", 64).tolist() == [[1.0], [1.0]]


def test_a_weight_of_code_values_is_exact_under_either_sign():
    values = torch.tensor(CODES["nf4"])
    for scale in (3.0, -3.0):
        weight = (values.repeat(4) * scale).view(1, 64)
        packed, scales = searched(weight, torch.ones(64), "nf4", 64)
        assert scales.item() == pytest.approx(scale)
        decoded = reference.dequantize_4bit(packed, scales, "nf4", 64, 64, torch.float32)
        assert torch.allclose(decoded, weight, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_zero_tiny_and_huge_blocks(quant_type):
    sizes = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1e-30, 1e30, torch.finfo(torch.float32).max])
    weight = (torch.rand(7, 64) * 2 - 1) * sizes[:, None]
    weight[6, 0] = torch.finfo(torch.float32).max
    packed, scales = searched(weight, torch.ones(64), quant_type, 64)
    expected_packed, absmax = reference.quantize_4bit(weight, quant_type, 64)
    assert torch.equal(scales[:3], absmax[:3]), "below the smallest normal number the scale is absmax"
    assert torch.equal(packed[:3], expected_packed[:3])
    assert scales.isfinite().all()
    decoded = reference.dequantize_4bit(packed, scales, quant_type, 64, 64, torch.float32)
    assert decoded.isfinite().all()
    for row in range(3, 7):
        found, given = decoded[row].double(), weight[row].double()
        assert (found - given).norm() < 0.15 * given.norm()


def test_a_scale_is_a_number_of_the_weights_dtype():
    """So a float16 weight decodes to float16 without Inf."""
    weight = torch.full((1, 64), 0.81).half() * 65504
    weight[0, 0] = 65504
    for sign in (1, -1):
        packed, scales = searched(weight * sign, torch.ones(64), "nf4", 64)
        assert scales.abs().item() <= 65504
        decoded = reference.dequantize_4bit(packed, scales, "nf4", 64, 64, torch.float16)
        assert decoded.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_block_with_nan_or_inf_has_an_infinite_scale_and_its_neighbours_do_not(bad):
    weight = torch.randn(2, 192)
    clean = reference.search_scales_4bit(weight, torch.ones(192), "nf4", 64)
    weight[1, 70] = bad
    packed, scales = searched(weight, torch.ones(192), "nf4", 64)
    assert scales[1, 1] == math.inf
    scales[1, 1] = clean[1, 1]
    assert torch.equal(scales, clean)
    assert (packed[1, 32:64] == 0x77).all(), "the code of 0.0"


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_looked_up_by_bins_are_those_of_the_codes(quant_type):
    boundaries = torch.tensor(NF4_BOUNDARIES if quant_type == "nf4" else FP4_MAGNITUDE_BOUNDARIES)
    edges = (torch.arange(-28, 29) / 28.0).float()
    points = torch.cat([boundaries, edges, torch.linspace(-1.0, 1.0, 997), torch.tensor([-0.0])])
    points = torch.cat([torch.nextafter(points, torch.full_like(points, to)) for to in (2.0, -2.0)] + [points])
    points = points.clamp(-1.0 if quant_type == "nf4" else 0.0, 1.0)
    ones = torch.ones(len(points), 1)
    packed = reference.encode_scaled_4bit(points[:, None], ones, quant_type, 32)
    decoded = reference.dequantize_4bit(packed, ones, quant_type, 32, 1, torch.float32)
    assert torch.equal(_code_values(points.clone(), quant_type), decoded[:, 0])
    beyond = torch.tensor([1.4, 1e30])
    assert _code_values(beyond.clone(), quant_type).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_encoding_with_absmax_is_what_quantize_does(quant_type):
    weight = torch.randn(9, 131)
    packed, absmax = reference.quantize_4bit(weight, quant_type, 32)
    assert torch.equal(reference.encode_scaled_4bit(weight, absmax, quant_type, 32), packed)


def test_encoding_clamps_what_a_scale_does_not_reach():
    weight = torch.tensor([[10.0, -10.0, 1e30, 0.0]])
    for scale in (1.0, -1.0, 1e-30, 0.0, -0.0):
        packed = reference.encode_scaled_4bit(weight, torch.tensor([[scale]]), "nf4", 32)
        ends = [0xF0, 0xF7] if not math.copysign(1.0, scale) < 0 else [0x0F, 0x07]
        assert packed.tolist() == [ends], scale


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=str)
def test_empty(shape):
    packed, scales = searched(torch.empty(shape), torch.ones(shape[1]), "nf4", 64)
    assert (packed.shape, scales.shape) == ((shape[0], -(-shape[1] // 2)), (shape[0], -(-shape[1] // 64)))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_default_dtype_reaches_no_boundary(quant_type):
    weight, importance = torch.randn(16, 320), torch.rand(320)
    expected = reference.search_scales_4bit(weight, importance, quant_type, 64)
    _bins.cache_clear()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = reference.search_scales_4bit(weight, importance, quant_type, 64)
    finally:
        torch.set_default_dtype(torch.float32)
        _bins.cache_clear()
    assert torch.equal(found, expected)
