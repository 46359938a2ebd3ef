"""Routes: which weight of a stack multiplies which row, as an order in which the rows are sorted by weight."""

import torch
from torch import Tensor

__all__ = ["sort_by_weight", "weights_of_rows"]


def sort_by_weight(ids: Tensor, weights: int) -> tuple[Tensor, Tensor]:
    """The order int64 [S] that sorts rows by their weight, and where the rows of each end in it: int32 [weights].

    A row whose id is no weight's comes behind the last. ids is int32 or int64 [S].
    """
    ordered, order = (ids & torch.iinfo(ids.dtype).max).sort(stable=True)  # without its sign, -1 is the largest id
    every = torch.arange(weights, device=ids.device, dtype=ids.dtype)
    return order, torch.searchsorted(ordered, every, right=True, out_int32=True)


def weights_of_rows(stops: Tensor, rows: int) -> Tensor:
    """int64 [rows]: which weight multiplies each sorted row; len(stops) for those behind the last of `stops`."""
    return torch.searchsorted(stops, torch.arange(rows, device=stops.device, dtype=stops.dtype), right=True)
