"""The search for the scales of 4-bit blocks that lose least where a weight's inputs are large: its specification.

A block's scale minimizes the sum of u * (w - scale * code)^2, with one u for each input feature, its importance. Tried
are four factors of the block's absmax, times -1 too with NF4, whose codes are not symmetric. The codes that a factor
gives determine the scale that is best for them, which is sum(u w c) / sum(u c c), and how good it is, which is
sum(u w c)^2 / sum(u c c). The codes of the best scale are tried once more. So the error is never above that of absmax.

Every product and sum is rounded to float32, and a sum is a tree of neighbours, so each device finds the same bits.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq.ops.checks import check_encode_scaled_4bit, check_search_scales_4bit
from bigq.ops.code_tables import (
    CODES,
    FP4_MAGNITUDE_BOUNDARIES,
    FP4_MAGNITUDE_ORDER,
    NF4_BOUNDARIES,
    bucket,
    row_chunks,
    tables_of,
)

__all__ = ["INVERSE_FACTORS", "encode_scaled_4bit", "search_scales_4bit"]

# 1 / (9/12, 10/12, 11/12, 1). 16 factors of .6 to 1.05 lower the error by 1 % more and take 3.5 times as long.
INVERSE_FACTORS = (12 / 9, 12 / 10, 12 / 11, 1.0)
_CHUNK_NUMEL = 1 << 17  # torch takes memory of 2 MiB from the system anew for each result: 2 to 4 times as slow
_TINY = torch.finfo(torch.float32).tiny
_INF = float("inf")


def search_scales_4bit(weight: Tensor, importance: Tensor, quant_type: str, block_size: int) -> Tensor:
    """Find a scale for each block of a [N, K] float weight, for `encode_scaled_4bit`.

    Args:
        weight: [N, K], float.
        importance: float32 [K], positive; the same for each row.

    Returns:
        float32 [N, B]. With "nf4" a scale may be negative. It is inf for a block that holds NaN or Inf, and a block
        below the smallest normal float keeps its absmax. The magnitude is at most the largest of weight's dtype.
    """
    check_search_scales_4bit(weight, importance)
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    scales = torch.empty(rows, blocks, dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return scales
    padding = blocks * block_size - columns
    u = F.pad(importance, (0, padding)).view(blocks, block_size).T.contiguous()[:, None, :]  # [block_size, 1, B]
    largest = torch.finfo(weight.dtype).max
    for start, stop in row_chunks(rows, columns, _CHUNK_NUMEL):
        x = F.pad(weight[start:stop].float(), (0, padding)).view(stop - start, blocks, block_size)
        absmax = torch.nan_to_num(x.abs().amax(dim=2), nan=_INF, posinf=_INF)
        w = (x * absmax.clamp_min(_TINY).reciprocal()[:, :, None]).masked_fill_(~absmax.isfinite()[:, :, None], 0.0)
        if quant_type == "fp4":  # it is symmetric
            w = w.abs_()
        # Elements of a block lie far apart and blocks side by side, so every operation runs over vectors of blocks.
        scale = _search(w.permute(2, 0, 1).contiguous(), u, quant_type)
        found = (scale * absmax).clamp_(-largest, largest)
        scales[start:stop] = torch.where((absmax < _TINY) | ~absmax.isfinite(), absmax, found)
    return scales


def _search(w: Tensor, u: Tensor, quant_type: str) -> Tensor:
    """The scales [...] of w [block_size, ...], whose blocks have an absmax of 1; u [block_size, ...] broadcasts."""
    best, scale = torch.full_like(w[0], -1.0), torch.ones_like(w[0])

    def attempt(inverse: float | Tensor) -> None:
        nonlocal best, scale
        codes = _code_values(w * inverse, quant_type)
        weighted = u * codes
        p, q = _tree_sum(weighted * w), _tree_sum(weighted.mul_(codes))
        score = p * p / q
        better = (q > 0.0) & (score > best)  # a tie keeps the earlier one
        best, scale = torch.where(better, score, best), torch.where(better, p / q, scale)

    for sign in (1.0, -1.0) if quant_type == "nf4" else (1.0,):
        for inverse in INVERSE_FACTORS:
            attempt(sign * inverse)
    attempt(scale.reciprocal())
    return scale


def _tree_sum(terms: Tensor) -> Tensor:
    """The sum over the first dimension, a power of two: neighbours are added, then neighbouring sums, and so on."""
    while len(terms) > 1:
        terms = terms[0::2] + terms[1::2]
    return terms[0]


@cache
def _bins(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The boundary inside each of 33 bins of width 1/14, and the values below and above it, [33] and [66] float32.

    Neighbouring boundaries are at least 0.0805 apart, so a bin holds at most one. One without has 2.0.
    """
    codes = CODES[quant_type]
    values, boundaries = list(codes), list(NF4_BOUNDARIES)
    if quant_type == "fp4":
        values, boundaries = [codes[code] for code in FP4_MAGNITUDE_ORDER], list(FP4_MAGNITUDE_BOUNDARIES)
    bin_of = [round(boundary * 14) + 16 for boundary in boundaries]
    inside = torch.full((33,), 2.0, dtype=torch.float32, device="cpu")
    inside[bin_of] = torch.tensor(boundaries, dtype=torch.float32, device="cpu")
    below = [sum(other < place for other in bin_of) for place in range(33)]
    pairs = [(values[count], values[min(count + 1, len(values) - 1)]) for count in below]
    return inside.to(device), torch.tensor(pairs, dtype=torch.float32, device="cpu").flatten().to(device)


def _code_values(scaled: Tensor, quant_type: str) -> Tensor:
    """The value of the code of each number; those beyond the table get its ends. FP4 is given magnitudes.

    What `bucket` and a table of values give takes 12 ns a number instead of 3.
    """
    inside, values = _bins(quant_type, scaled.device)
    flat = scaled.clamp_(-1.0, 1.0).flatten()
    place = (flat * 14.0 + 16.5).int()
    above = flat > inside.index_select(0, place)
    return values.index_select(0, place.mul_(2).add_(above)).view(scaled.shape)


def encode_scaled_4bit(weight: Tensor, scales: Tensor, quant_type: str, block_size: int) -> Tensor:
    """Encode a [N, K] float weight with given scales, float32 [N, B] of either sign: packed uint8 [N, ceil(K/2)].

    Each number gets the code whose value times the scale is nearest. A block with an infinite scale gets the code of
    0.0.
    """
    check_encode_scaled_4bit(weight, scales, block_size)
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    packed = torch.empty(rows, -(-columns // 2), dtype=torch.uint8, device=weight.device)
    boundaries, bucket_code, _ = tables_of(quant_type, weight.device)
    for start, stop in row_chunks(rows, columns) if weight.numel() else ():
        x = F.pad(weight[start:stop].float(), (0, blocks * block_size - columns)).view(-1, blocks, block_size)
        scale = scales[start:stop]
        inverse = scale.abs().clamp_min(_TINY).reciprocal().copysign(scale)
        scaled = (x * inverse[:, :, None]).masked_fill_(~scale.isfinite()[:, :, None], 0.0)
        codes = bucket_code[bucket(scaled, boundaries).int()].view(stop - start, -1)
        packed[start:stop] = (codes[:, 0:columns:2] << 4) | codes[:, 1 : columns + 1 : 2]
    return packed
