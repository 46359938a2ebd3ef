"""What the formats mean, computed once more in float64 and as plainly as can be, to test the ops against."""

import torch
from torch import Tensor

from bigq.ops.reference import CODES

__all__ = ["block_maxima", "nearest_values", "product_int8"]


def block_maxima(weight: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block of each row: float64 [N, B] of [N, K]; a last block may be shorter."""
    blocks = torch.split(weight.double().abs(), block_size, dim=1)
    return torch.stack([block.amax(dim=1) for block in blocks], dim=1)


def nearest_values(weight: Tensor, scales: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """How far each number of a weight [N, K] is from its nearest code times scale, and the scale: float64 [N, K]."""
    table = torch.tensor(CODES[quant_type], dtype=torch.float64)
    wide = scales.double().repeat_interleave(block_size, dim=1)[:, : weight.shape[1]]
    distances = (wide[..., None] * table - weight.double()[..., None]).abs()
    return distances.amin(dim=2), wide


def product_int8(x: Tensor, weight_codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
    """LLM.int8() of x [M, K] and the codes of a weight [N, K] with row scales [N, 1]: float64 [M, N].

    Columns of x with a magnitude of `threshold` or more are multiplied as they are. The rest of x is first rounded to
    codes of its rows, in float32, as the format says.
    """
    outlier = x.abs() >= threshold
    columns = outlier.any(dim=0)
    rest = x.float().masked_fill(outlier, 0.0)
    scale = rest.abs().amax(dim=1, keepdim=True)
    codes = (rest * (scale.clamp_min(2.0**-119).reciprocal() * 127.0)).round().masked_fill(columns, 0.0)
    whole = codes.double() @ weight_codes.double().T * scale.double() * absmax.double().T / 127**2
    return whole + x.double().masked_fill(~columns, 0.0) @ weight_codes.double().T * absmax.double().T / 127
