"""Parts of products with a weight or a stack of weights, added row by row."""

import pytest
import torch

from bigq_kernels.block4.row_parts import add_parts_of_rows
from bigq_kernels.groups import group_tokens

STOPS, IDS = [2, 2, 7, 8], [0, 0, 2, 2, 2, 2, 2, 3, -1]  # of four weights, and a row of none


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("split", [2, 3])
@pytest.mark.parametrize("single", [False, True], ids=["groups", "rows"])
def test_rows_are_the_sums_of_their_parts_and_the_bias_of_their_weight(single, split, has_bias, device):
    s, n, block_m = len(IDS), 300, 2
    partial, bias = torch.randn(split, s, n, device=device), torch.randn(len(STOPS), n, device=device)
    partial[:, -1] = 0.0 if single else torch.nan  # groups have no parts of this row
    out, ids = torch.full((s, n), torch.nan, device=device), torch.tensor(IDS, device=device)
    if single:
        route, entries = ids, s
    else:
        stops, count = torch.tensor(STOPS, dtype=torch.int32, device=device), torch.empty(0, dtype=torch.int32)
        route = group_tokens(stops, len(STOPS), block_m, count.to(device), out)
        entries = len(route)
    add_parts_of_rows(partial, bias if has_bias else None, out, split, route, len(STOPS), entries, block_m, single)
    expected = partial.sum(0)
    expected[-1] = 0.0
    if has_bias:
        expected[:-1] += bias[ids[:-1]]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("split", [2, 7])
def test_rows_of_a_linear_are_the_sums_of_their_parts_and_one_bias(split, has_bias, device):
    partial, bias = torch.randn(split, 3, 300, device=device), torch.randn(300, device=device)
    out = torch.full((1, 3, 300), torch.nan, device=device)  # a linear keeps the shape of its input
    add_parts_of_rows(partial, bias if has_bias else None, out, split, None, 1, 3, 8, False)
    torch.testing.assert_close(out[0], partial.sum(0) + (bias if has_bias else 0))
