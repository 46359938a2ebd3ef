"""Every element of every token is where the product that follows reads it, and counts are zeroed."""

import pytest
import torch

from bigq_kernels.block4.tokens import split_tokens, tile_tokens
from bigq_kernels.groups import group_tokens, most_tiles


def expected_tiles(x, block_m):
    """[tiles, K / 64, block_m, 64] with rows past M zero, from the order of K that the module's docstring gives."""
    m, k = x.shape
    tiles = -(-m // block_m)
    padded = x.new_zeros(tiles * block_m, k)
    padded[:m] = x
    order = torch.empty(32, dtype=torch.long)
    for s in range(4):
        for h in range(2):
            for c in range(4):
                order[8 * s + 4 * h + c] = 8 * c + 2 * s + h
    pairs = padded.view(tiles, block_m, k // 64, 32, 2)[:, :, :, order]
    return pairs.permute(0, 2, 1, 3, 4).reshape(tiles, k // 64, block_m, 64)


@pytest.mark.parametrize(
    "m, k, block_m, counts, dtype",
    [
        pytest.param(64, 256, 64, 0, torch.float16, id="whole-tile"),
        pytest.param(67, 4352, 64, 5, torch.bfloat16, id="partial-tile-and-program"),
        pytest.param(1, 64, 16, 1, torch.bfloat16, id="one-slice"),
        pytest.param(3, 128, 32, 5000, torch.float16, id="more-counts-than-a-round-of-programs"),
        pytest.param(301, 192, 64, 5000, torch.bfloat16, id="several-tokens-a-program"),
    ],
)
def test_tile_tokens(m, k, block_m, counts, dtype, device):
    x = torch.randn(m, k, device=device).to(dtype)
    count = torch.full((counts,), -1, dtype=torch.int32, device=device)
    tiles = tile_tokens(x, block_m, k, count)
    wider = tile_tokens(x, block_m, k + 192, count)
    written = torch.arange(tiles.shape[0] * block_m, device=device).view(-1, 1, block_m, 1) < m
    expected = expected_tiles(x.cpu(), block_m).to(device)
    assert torch.equal(tiles.masked_fill(~written, 0.0), expected)
    assert torch.equal(wider[:, : k // 64].masked_fill(~written, 0.0), expected)
    assert not wider[:, k // 64 :].masked_fill(~written, 0.0).any()
    assert not count.any()
    swapped = tile_tokens(x, block_m, k, count, swapped=True).masked_fill(~written, 0.0)
    pieces, places = swapped.unflatten(3, (8, 8)), torch.arange(8, device=device)
    for row in range(block_m):  # piece p lies at place p ^ (row % 8)
        assert torch.equal(pieces[:, :, row, places ^ (row % 8)].flatten(2), expected[:, :, row])


@pytest.mark.parametrize("block_m", [2, 32])
def test_tile_tokens_of_groups(block_m, device):
    ends, rows, k = [0, 3, 3, 40, 41], 43, 128
    x = torch.randn(rows, k, device=device).half()
    count, out = torch.full((7,), -1, dtype=torch.int32, device=device), torch.zeros(rows, 4, device=device)
    groups = group_tokens(torch.tensor(ends, dtype=torch.int32, device=device), len(ends), block_m, count[:0], out)
    tiles = tile_tokens(x, block_m, k, count, groups)
    assert len(tiles) == most_tiles(rows, len(ends), block_m)
    place = 0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        expected = expected_tiles(x[start:end].cpu(), block_m)
        written = torch.arange(len(expected) * block_m).view(-1, 1, block_m, 1) < end - start
        got = tiles[place : place + len(expected)].cpu()
        assert torch.equal(got.masked_fill(~written, 0.0), expected)
        place += len(expected)
    assert not count.any()


@pytest.mark.parametrize(
    "m, k, counts, dtype",
    [
        pytest.param(3, 96, 7, torch.float16, id="one-program"),
        pytest.param(5, 1056, 0, torch.bfloat16, id="no-counts"),
        pytest.param(1, 32, 5000, torch.float16, id="more-counts-than-pairs"),
    ],
)
def test_split_tokens(m, k, counts, dtype, device):
    x = torch.randn(m, k, device=device).to(dtype)
    count = torch.full((counts,), -1, dtype=torch.int32, device=device)
    assert torch.equal(split_tokens(x, count), torch.stack([x[:, ::2], x[:, 1::2]], dim=1))
    assert not count.any()
