"""Routes: which weight of a stack multiplies which row; the rows sorted by weight, gated, and summed again by token."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "dot_rows",
    "gated",
    "gated_backward",
    "order_by_weight",
    "rows_of_weights",
    "sort_rows",
    "sum_rows",
    "take_rows",
    "weights_of_rows",
]


def rows_of_weights(stops: Tensor) -> Iterator[tuple[int, slice]]:
    """Each weight that has rows, and these rows, which are sorted by weight. The host reads `stops`."""
    start = 0
    for weight, stop in enumerate(stops.tolist()):
        if stop > start:
            yield weight, slice(start, stop)
            start = stop


def order_by_weight(ids: Tensor, weights: int) -> tuple[Tensor, Tensor]:
    """The order int64 [S] that sorts rows by their weight, and where the rows of each end in it: int32 [weights].

    A row whose id is no weight's comes behind the last. ids is int32 or int64 [S].
    """
    ordered, order = (ids & torch.iinfo(ids.dtype).max).sort(stable=True)  # without its sign, -1 is the largest id
    every = torch.arange(weights, device=ids.device, dtype=ids.dtype)
    return order, torch.searchsorted(ordered, every, right=True, out_int32=True)


def weights_of_rows(stops: Tensor, rows: int) -> Tensor:
    """int64 [rows]: which weight multiplies each sorted row; len(stops) for those behind the last of `stops`."""
    return torch.searchsorted(stops, torch.arange(rows, device=stops.device, dtype=stops.dtype), right=True)


def sort_rows(ids: Tensor, weights: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order int64 [S], places int32 [S], stops int32 [weights]) of rows whose weights are ids [S], int32 or int64.

    Rows of one weight keep their order. Those whose id is no weight's come last, in theirs. places[order[s]] is s.
    """
    order, stops = order_by_weight(torch.where((ids >= 0) & (ids < weights), ids, weights), weights)
    every = torch.arange(len(ids), device=ids.device, dtype=torch.int32)
    return order, every.index_copy(0, order, every), stops


def take_rows(x: Tensor, order: Tensor | None, factors: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    """[S, N] of `dtype`: row order[s] // top_k of x [T, N], times factors [T, top_k] at order[s]. S is `rows`.

    No order is that of the tokens.
    """
    top_k = rows // max(len(x), 1)
    taken = x.repeat_interleave(top_k, dim=0) if order is None else x[order // max(top_k, 1)]
    if factors is None:
        return taken.to(dtype)
    own = factors.reshape(-1, 1)
    return (_wide(taken) * (own if order is None else own[order])).to(dtype)


def sum_rows(rows: Tensor, places: Tensor | None, factors: Tensor | None, tokens: int, dtype: torch.dtype) -> Tensor:
    """[T, N] of `dtype`: the sum of each token's rows of [S, N], which stand at `places`, times factors [T, top_k].

    No places are those in the order of the tokens.
    """
    each = rows if places is None else rows.index_select(0, places)
    top_k = len(rows) // max(tokens, 1) if factors is None else factors.shape[1]
    each = _wide(each).view(tokens, top_k, rows.shape[1])
    return (each if factors is None else each * factors[:, :, None]).sum(dim=1).to(dtype)


def dot_rows(rows: Tensor, places: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, top_k] of `dtype`: each token's rows of [S, N], which stand at `places`, times its row of x [T, N]."""
    each = rows if places is None else rows.index_select(0, places)
    each = _wide(each).view(len(x), len(rows) // max(len(x), 1), rows.shape[1])
    return (each * x[:, None]).sum(dim=2).to(dtype)


def _wide(rows: Tensor) -> Tensor:
    """In float32, if they have fewer bits."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def gated(x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    """[S, I] of x [S, 2I], in its dtype: what fused experts compute between their two products.

    - "silu": x is the gate and then the other half; silu(gate) * up.
    - "clamped": the two alternate, are clamped to `limit`, and give (up + 1) * gate * sigmoid(alpha * gate).
    """
    gate, up = _halves(x, kind)
    if kind == "silu":
        return (gate * gate.sigmoid() * up).to(x.dtype)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * (alpha * gate).sigmoid()).to(x.dtype)


def gated_backward(grad: Tensor, x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    """The gradient of x [S, 2I] in `gated` from that of its result, grad [S, I]."""
    gate, up = _halves(x, kind)
    if kind == "silu":
        share = gate.sigmoid()
        of_both = grad * up * share * (1 + gate * (1 - share)), grad * gate * share
        return torch.cat(of_both, dim=1).to(x.dtype)
    low, middle = gate.clamp(max=limit), up.clamp(-limit, limit)
    share = (alpha * low).sigmoid()
    of_gate = (grad * (middle + 1) * share * (1 + alpha * low * (1 - share))).masked_fill(gate > limit, 0)
    of_up = (grad * low * share).masked_fill(up.abs() > limit, 0)
    return torch.stack([of_gate, of_up], dim=2).view(x.shape).to(x.dtype)


def _halves(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(gate, up) of x [S, 2I]."""
    if kind not in ("silu", "clamped"):
        raise RuntimeError(f"the gate is {kind!r}; expected 'silu' or 'clamped'")
    wide = _wide(x)
    return wide.chunk(2, dim=1) if kind == "silu" else (wide[:, ::2], wide[:, 1::2])  # type: ignore[return-value]
