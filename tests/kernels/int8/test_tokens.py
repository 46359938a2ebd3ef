"""The tokens of LLM.int8(): their codes, and the list of their outlier columns."""

import pytest
import torch

from bigq_kernels.int8.planes import quantize_planes
from bigq_kernels.int8.tokens import Tokens, _or_marks_kernel, quantize_tokens
from bigq_kernels.launch import launch

THRESHOLD = 6.0


def tokens(m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Outliers in the first, the last and other columns, one of them in the last token alone."""
    x = torch.randn(m, k, device=device).clamp(-5, 5)
    x[0, 0], x[m // 2, k // 3], x[m // 2, k // 3 + 1], x[m - 1, k - 1] = 8.0, -THRESHOLD, 60.0, 7.0
    return x.to(dtype)


def listed(found: Tokens) -> list[int]:
    """The outlier columns."""
    marks = found.marks.tolist()
    return [32 * number + bit for number, word in enumerate(marks) for bit in range(32) if word >> bit & 1]


def codes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes by the largest of each row of float32 x, and that."""
    scale = x.abs().amax(dim=1)
    inverse = scale.clamp_min(2.0**-119).reciprocal() * 127.0
    return (x * inverse[:, None]).round().nan_to_num(0.0).to(torch.int8), scale


B, H, F = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "m, k, dtype",
    [
        *(pytest.param(1, 16, dtype, id=f"one-short-token-{dtype}") for dtype in (B, H, F)),
        *(pytest.param(3, 97, dtype, id=f"odd-columns-{dtype}") for dtype in (B, H, F)),
        pytest.param(20, 300, H, id="several-segments"),
        pytest.param(65, 66, B, id="more-tokens-than-one-load"),
        pytest.param(70, 99, H, id="more-tokens-and-odd-columns"),
        pytest.param(129, 300, F, id="many-tokens"),
        pytest.param(513, 100, H, id="more-tokens-than-one-program-looks-at"),
        pytest.param(2050, 130, B, id="more-tokens-than-a-tile", marks=pytest.mark.gpu),  # a minute in the interpreter
        pytest.param(2, 17000, B, id="more-columns-than-a-tile"),
    ],
)
def test_codes_and_outlier_columns(m, k, dtype, device):
    x = tokens(m, k, dtype, device)
    found = quantize_tokens(x, THRESHOLD, None, False)
    outlier = x.abs() >= THRESHOLD
    expected_codes, expected_scale = codes_of(x.float().masked_fill(outlier, 0.0))
    assert torch.equal(found.codes, expected_codes)
    assert torch.equal(found.scale, expected_scale)
    assert listed(found) == outlier.any(dim=0).nonzero().flatten().tolist()


def test_more_tokens_than_are_looked_at_together(device):
    marks = torch.zeros(50, 8, dtype=torch.int32, device=device)  # 256 columns, two segments
    marks[0, 0], marks[20, 0], marks[49, 3], marks[49, 7] = 5, 4, -(2**31), 1
    out = torch.empty(8, dtype=torch.int32, device=device)
    launch(_or_marks_kernel, (2,), marks, out, 50, WORDS=4, BLOCK_M=8, LOADS=2, PDL=False, options={})
    assert out.tolist() == [5, 0, 0, -(2**31), 0, 0, 0, 1]


def test_a_threshold_of_0_lists_nothing(device):
    x = tokens(5, 300, torch.float16, device)
    found = quantize_tokens(x, 0.0, None, False)
    assert found.marks is None
    expected_codes, expected_scale = codes_of(x.float())
    assert torch.equal(found.codes, expected_codes)
    assert torch.equal(found.scale, expected_scale)


def test_tokens_that_are_not_aligned_for_pairs(device):
    x = tokens(20, 300, torch.float16, device)
    moved = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view(x.shape).copy_(x)
    aligned, found = quantize_tokens(x, THRESHOLD, None, False), quantize_tokens(moved, THRESHOLD, None, False)
    assert listed(found) == listed(aligned) == [0, 100, 101, 299]
    assert torch.equal(found.codes, aligned.codes)


@pytest.mark.parametrize("dtype", [B, H], ids=str)
def test_the_threshold_and_its_neighbours(dtype, device):
    """Below it, at it and above it, of both signs, in both elements of a pair."""
    bits = torch.tensor([THRESHOLD], dtype=dtype).view(torch.int16) + torch.tensor([-1, 0, 1], dtype=torch.int16)
    values = bits.view(dtype)
    x = torch.zeros(17, 96, dtype=dtype, device=device)
    x[16, 31:37], x[0, 64:70] = torch.cat([values, -values]).to(device), torch.cat([values, -values]).to(device)
    assert listed(quantize_tokens(x, THRESHOLD, None, False)) == [32, 33, 35, 36, 65, 66, 68, 69]


@pytest.mark.parametrize("dtype", [B, H], ids=str)
def test_the_smallest_threshold_marks_what_is_not_0(dtype, device):
    """Also where the interpreter rounds the smallest bfloat16 to 0: no column past the last is marked."""
    x = torch.zeros(20, 34, dtype=dtype, device=device)
    x[3, 7], x[4, 33] = 1.0, -1.0
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert listed(quantize_tokens(x, smallest, None, False)) == [7, 33]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", [B, H, F], ids=str)
def test_inf_is_an_outlier_and_nan_is_none(dtype, device):
    x = torch.ones(20, 300, dtype=dtype, device=device)
    x[3, 7], x[4, 200], x[5, 299] = float("inf"), float("nan"), float("-inf")
    found = quantize_tokens(x, THRESHOLD, None, False)
    assert listed(found) == [7, 299]
    assert found.scale.isnan().nonzero().flatten().tolist() == [4]
    assert found.codes[3, 7] == found.codes[5, 299] == 0


@pytest.mark.parametrize(
    "m, k, dtype",
    [(1, 97, B), (5, 97, H), (16, 97, B), (1, 4096, H), (5, 4096, B), (16, 4096, H), (1, 4100, B), (16, 8200, H)],
    ids=str,
)
def test_planes(m, k, dtype, device):
    x = tokens(m, k, dtype, device)
    codes, scale = quantize_planes(x, THRESHOLD, None, False)
    outlier = x.abs() >= THRESHOLD
    column = outlier.any(dim=0)
    expected_codes, expected_scale = codes_of(x.float().masked_fill(outlier, 0.0))
    assert torch.equal(codes[0], expected_codes.masked_fill(column, 0))
    assert torch.equal(scale[0], expected_scale)
    wide = x.float().masked_fill(~column, 0.0)
    assert torch.equal(scale[1], wide.abs().amax(dim=1))
    assert torch.equal(scale[2] * 128, scale[1])
    code = codes[1].int() * 128 + codes[2].int()
    inverse = scale[1].clamp_min(2.0**-119).reciprocal() * 127.0
    assert torch.equal(code, (wide * inverse[:, None] * 128.0).round().int())
    assert codes[2].min() >= -64
