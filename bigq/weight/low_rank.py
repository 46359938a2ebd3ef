"""LowRank: a change of each weight of a stack, held as two factors, as an adapter of LoRA is.

The change of a whole stack is as large as the stack in bfloat16, so it is never computed. A row is multiplied by the
two factors of its weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from bigq.ops.routes import weights_of_rows

__all__ = ["Changes", "LowRank"]

ALIGNED = 8  # numbers: rows of `grouped_mm` are whole 16 bytes, also those of bfloat16


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What is added to the weights of a stack [E, N, K]: `scaling` times up[e] times down[e].

    Args:
        down: [E, r, K], floating point, of any strides.
        up: [E, N, r], floating point, of any strides.
        scaling: a factor.
    """

    down: Tensor
    up: Tensor
    scaling: float

    def grouped(self, x: Tensor, stops: Tensor) -> Tensor:
        """What it adds to a product of rows x [S, K] that are sorted by weight: [S, N], in the dtype of x.

        `stops` int32 [E] says where the rows of each weight end. Rows after the last of them give zeros.
        """
        if is_compiling() and x.dtype != torch.bfloat16:
            return self._masked(x, stops)
        n, rank = self.up.shape[1:]
        down = F.pad(self.down.to(x.dtype), (0, -x.shape[1] % ALIGNED, 0, -rank % ALIGNED, 0, 1))
        up = F.pad(self.up.to(x.dtype), (0, -rank % ALIGNED, 0, -n % ALIGNED, 0, 1))
        every = torch.cat([stops, stops.new_full((1,), len(x))])  # the rest belongs to the zeros behind the last weight
        wide = F.pad(x, (0, -x.shape[1] % ALIGNED)) if x.shape[1] % ALIGNED else x.contiguous()
        inner = F.grouped_mm(wide, down.mT, offs=every)
        out = F.grouped_mm(inner * self.scaling, up.mT, offs=every)
        return out[:, :n] if n % ALIGNED else out  # a slice has a gradient of its own, also if it is all of it

    def _masked(self, x: Tensor, stops: Tensor) -> Tensor:
        """`grouped`, where graphs have no `grouped_mm`: each row times all factors, of which one counts."""
        is_own = weights_of_rows(stops, len(x))[:, None] == torch.arange(len(self.down), device=x.device)
        inner = torch.einsum("sk,erk->ser", x, self.down.to(x.dtype)).masked_fill(~is_own[:, :, None], 0)
        return torch.einsum("ser,enr->sn", inner * self.scaling, self.up.to(x.dtype))

    def routed(self, x: Tensor, ids: Tensor) -> Tensor:
        """What it adds to row i of [S, N], which is row i // (S / M) of x [M, K] times weight ids[i], int [S].

        A row whose id is no weight's gives zeros.
        """
        known = (ids >= 0) & (ids < len(self.down))
        ids = torch.where(known, ids, 0)
        rows = x if len(x) == len(ids) else x.repeat_interleave(len(ids) // max(len(x), 1), dim=0)
        inner = torch.bmm(self.down[ids].to(x.dtype), rows[:, :, None])
        inner = inner.masked_fill(~known[:, None, None], 0)
        return torch.bmm(self.up[ids].to(x.dtype), inner * self.scaling)[:, :, 0]


Changes = Mapping[str, Sequence[LowRank]]  # of the weights of a module, by leaf
