"""separated: a stack of quantized weights as the matrices that checkpoints of other libraries hold in its place."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bigq.saving.saved_weight import SavedWeight

__all__ = ["separated"]


def separated(weight: SavedWeight) -> list[SavedWeight]:
    """The matrices of `weight`, with views of its codes and scales; itself if checkpoints hold it whole.

    Double quantization has one offset for a weight, and blocks of 256 scales that do not end with a matrix. So the
    scales are decoded, which changes no number.
    """
    if weight.rows is None:
        return [weight]
    description, state = weight.description, weight.state
    if any(tensor.is_meta for tensor in state.values()):  # an outline: its parts of one number are not on meta
        state = {part: tensor.to("meta") for part, tensor in state.items()}
    weight_format, state = description.format.select(state, description.shape, slice(None))
    description = replace(description, format=weight_format)
    matrices = []
    for name, rows in weight.rows.items():
        own = replace(description, shape=(len(rows), description.shape[-1]))
        parts = {part: _rows(tensor, rows) for part, tensor in state.items()}
        leaf = name.rpartition(".")[2]
        matrices.append(SavedWeight(name=name, leaf=leaf, description=own, state=parts, kind=nn.Linear))
    return matrices


def _rows(part: Tensor, rows: range) -> Tensor:
    flat = part.flatten(0, 1)
    if part.is_meta:  # tensors on meta that share a storage count as one
        return torch.empty(len(rows), flat.shape[1], dtype=part.dtype, device="meta")
    return flat[rows.start : rows.stop]
