"""LowRank: each row gets the change of its weight, whichever way computes it."""

import pytest
import torch

from bigq.weight.low_rank import LowRank


def change(experts, rank, n, k, dtype=torch.float32):
    down, up = torch.randn(experts, rank, k, dtype=dtype), torch.randn(n, rank, experts, dtype=dtype).permute(2, 0, 1)
    return LowRank(down=down.requires_grad_(), up=up.requires_grad_(), scaling=0.7)


def expected(low_rank, x, ids):
    dense = low_rank.scaling * low_rank.up.double() @ low_rank.down.double()
    padded = torch.cat([dense, torch.zeros_like(dense[:1])])  # of rows of no weight
    return torch.stack([padded[e] @ row for e, row in zip(ids, x.double(), strict=True)])


@pytest.mark.parametrize("way", ["grouped", "masked", "routed"])
@pytest.mark.parametrize("rank, n, k", [(8, 64, 32), (3, 24, 40), (1, 7, 13)], ids=["even", "rank 3", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_rows_and_gradients_are_those_of_the_product(way, rank, n, k, dtype):
    low_rank = change(4, rank, n, k, dtype)
    x = torch.randn(9, k, dtype=dtype, requires_grad=True)
    ids = [0, 0, 2, 2, 2, 3, 3, 4, 4]  # no row of weight 1, and two of none
    stops = torch.tensor([2, 2, 5, 7], dtype=torch.int32)
    if way == "routed":
        out = low_rank.routed(x, torch.tensor([*ids[:-1], -1]))
    else:
        out = low_rank.grouped(x, stops) if way == "grouped" else low_rank._masked(x, stops)
    assert out.dtype == dtype
    assert not out[7:].any()
    leaves = [x, low_rank.down, low_rank.up]
    wanted = expected(low_rank, x, ids)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), leaves)
    budget = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]  # two roundings, and their squares
    for found, exact in zip([out, *gradients], [wanted, *wanted_gradients], strict=True):
        assert (found.double() - exact.double()).norm() <= budget * exact.double().norm()


def test_rows_that_read_one_row_of_x_sum_their_gradients():
    low_rank = change(3, 2, 8, 16)
    x = torch.randn(2, 16, requires_grad=True)
    ids = torch.tensor([0, 2, 1, 1])
    out = low_rank.routed(x, ids)
    torch.testing.assert_close(out, expected(low_rank, x.repeat_interleave(2, dim=0), ids).float())
    (found,) = torch.autograd.grad(out.sum(), [x], retain_graph=True)
    dense = low_rank.scaling * low_rank.up @ low_rank.down
    torch.testing.assert_close(found, torch.stack([dense[[0, 2]].sum(dim=(0, 1)), dense[[1, 1]].sum(dim=(0, 1))]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_gpu_has_the_numbers_of_the_cpu(dtype):
    low_rank, x = change(16, 12, 96, 64, dtype), torch.randn(200, 64, dtype=dtype, requires_grad=True)
    stops = torch.linspace(5, 190, 16).int()
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in (x, low_rank.down, low_rank.up)]
        out = LowRank(down=leaves[1], up=leaves[2], scaling=0.7).grouped(leaves[0], stops.to(device))
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        results.append([tensor.double().cpu() for tensor in (out, *gradients)])
    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * exact.norm()
