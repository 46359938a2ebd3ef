"""The tokens of LLM.int8(): their codes, and the list of their outlier columns."""

import pytest
import torch

from bigq_kernels.int8.planes import quantize_planes
from bigq_kernels.int8.tokens import _list_outliers_kernel, quantize_tokens
from bigq_kernels.launch import launch

THRESHOLD = 6.0


def tokens(m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Outliers in the first, the last and other columns, one of them in the last token alone."""
    x = torch.randn(m, k, device=device).clamp(-5, 5)
    x[0, 0], x[m // 2, k // 3], x[m // 2, k // 3 + 1], x[m - 1, k - 1] = 8.0, -THRESHOLD, 60.0, 7.0
    return x.to(dtype)


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
        pytest.param(129, 300, F, id="many-tokens"),
        pytest.param(2050, 130, B, id="more-tokens-than-a-tile", marks=pytest.mark.gpu),  # a minute in the interpreter
        pytest.param(2, 17000, B, id="more-columns-than-a-tile"),
    ],
)
def test_codes_and_outlier_columns(m, k, dtype, device):
    x = tokens(m, k, dtype, device)
    codes, scale, counts, columns = quantize_tokens(x, THRESHOLD, None, False)
    outlier = x.abs() >= THRESHOLD
    expected_codes, expected_scale = codes_of(x.float().masked_fill(outlier, 0.0))
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    listed = [column for row, count in zip(columns.tolist(), counts.tolist(), strict=True) for column in row[:count]]
    assert listed == outlier.any(dim=0).nonzero().flatten().tolist()


def test_more_tokens_than_are_looked_at_together(device):
    marks = torch.zeros(50, 8, dtype=torch.int32, device=device)  # 256 columns, two segments
    marks[0, 0], marks[20, 0], marks[49, 3], marks[49, 7] = 5, 4, -(2**31), 1
    counts = torch.empty(2, dtype=torch.int32, device=device)
    columns = torch.empty(2, 128, dtype=torch.int32, device=device)
    launch(
        _list_outliers_kernel, (2,), marks, counts, columns, 50, SEGMENT=128, BLOCK_M=8, LOADS=2, PDL=False, options={}
    )
    assert counts.tolist() == [3, 1]
    assert columns[0, :3].tolist() == [0, 2, 127]
    assert columns[1, 0] == 7 * 32


def test_a_threshold_of_0_lists_nothing(device):
    x = tokens(5, 300, torch.float16, device)
    codes, scale, counts, columns = quantize_tokens(x, 0.0, None, False)
    assert counts is None
    assert columns is None
    expected_codes, expected_scale = codes_of(x.float())
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_inf_is_an_outlier_and_nan_is_none(device):
    x = torch.ones(20, 300, dtype=torch.bfloat16, device=device)
    x[3, 7], x[4, 200], x[5, 299] = float("inf"), float("nan"), float("-inf")
    codes, scale, counts, columns = quantize_tokens(x, THRESHOLD, None, False)
    assert counts.tolist() == [1, 0, 1]
    assert (columns[0, 0], columns[2, 0]) == (7, 299)
    assert scale.isnan().nonzero().flatten().tolist() == [4]
    assert codes[3, 7] == codes[5, 299] == 0


@pytest.mark.parametrize(
    "m, k, dtype",
    [(1, 97, B), (5, 97, H), (16, 97, B), (1, 4096, H), (5, 4096, B), (16, 4096, H), (1, 4100, B), (16, 8200, H)],
    ids=str,
)
def test_planes(m, k, dtype, device):
    x = tokens(m, k, dtype, device)
    codes, scale, listed = quantize_planes(x, THRESHOLD, True, None, False)
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
    segments = (column.nonzero().flatten() // 32).unique().tolist()  # ascending
    assert listed[: 1 + len(segments)].tolist() == [len(segments), *segments]
    again, _, unlisted = quantize_planes(x, THRESHOLD, False, None, False)
    assert torch.equal(again, codes)
    assert unlisted is None
