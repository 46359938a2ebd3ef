"""Products of rows with a stack of weights that are not quantized, each row by its own."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq_kernels.groups import rows_of_weights

__all__ = ["grouped_matmul"]


def grouped_matmul(x: Tensor, stops: Tensor, dense: Tensor) -> Tensor:
    """x [S, K] times dense [E, K, N]: [S, N], in x's dtype.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]; rows after the last give zeros.
    stops is int32 [E]. torch's own product takes bfloat16 whose rows are whole 16 bytes, and does not wait for the GPU.
    Others are one product for each weight, for which the host reads `stops`.
    """
    k, n = dense.shape[1:]
    if x.is_cuda and x.dtype == torch.bfloat16 and x.numel() and dense.numel() and k % 8 == 0 and n % 8 == 0:
        behind = torch.arange(len(x), device=x.device) >= stops[-1:]  # torch leaves these rows as they were
        return F.grouped_mm(x.contiguous(), dense, offs=stops).masked_fill_(behind[:, None], 0)
    out = x.new_zeros(len(x), n)
    for e, rows in rows_of_weights(stops):
        out[rows] = x[rows] @ dense[e]
    return out
