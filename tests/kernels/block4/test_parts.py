"""The parts of tiles that several programs share, added in their order; tiles of one program are left alone."""

import pytest
import torch

from bigq_kernels.block4.parts import add_parts_of_tiles

BLOCK_N, BLOCK_M, STEPS = 16, 8, 5


@pytest.mark.parametrize(
    "tiles, programs",
    [
        pytest.param(4, 4, id="a-tile-each"),
        pytest.param(4, 1, id="all-in-one"),
        pytest.param(4, 7, id="uneven"),
        pytest.param(7, 3, id="more-than-two-tiles-each"),
        pytest.param(2, 10, id="a-step-each"),
        pytest.param(1, 3, id="one-tile"),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_parts_are_added(tiles, programs, has_bias, device):
    m, n = 5, tiles * BLOCK_N - 3
    bias = torch.randn(n, device=device) if has_bias else None
    shares = torch.tensor_split(torch.arange(tiles * STEPS), programs)  # the first ones are the longer ones
    partial = torch.full((programs, 2, BLOCK_N, BLOCK_M), torch.nan, device=device)
    expected = torch.full((tiles, BLOCK_N, BLOCK_M), -1.0, device=device)
    for tile in range(tiles):
        owners = [p for p, share in enumerate(shares) if (share // STEPS == tile).any()]
        if len(owners) == 1:
            continue
        expected[tile] = 0
        for p in owners:
            part = torch.randn(BLOCK_N, BLOCK_M, device=device)
            partial[p, int(shares[p][0] // STEPS != tile)] = part
            expected[tile] += part
        if bias is not None:
            rows = bias[tile * BLOCK_N : (tile + 1) * BLOCK_N]
            expected[tile, : len(rows)] += rows[:, None]
    out = torch.full((m, n), -1.0, device=device)
    add_parts_of_tiles(partial, bias, out, STEPS, programs, (BLOCK_N, BLOCK_M), pdl=False)
    assert torch.equal(out, expected.transpose(1, 2).permute(1, 0, 2).reshape(BLOCK_M, -1)[:m, :n])
