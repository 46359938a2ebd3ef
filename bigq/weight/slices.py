"""Slices: a quantized module keeps the rows, columns or matrices of its weights that belong to one process of several.

The module is then a smaller one of the same kind: its descriptions, its quant_state and what its kernels get are those
of the slice.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedError
from bigq.formats import state_name
from bigq.ops.sharding import chunk_of_rank, is_sharded
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["Range", "is_sliced", "keep_ranges", "range_of_rank", "refuse_slice", "refuse_slices"]

Range = tuple[int, int]


def range_of_rank(size: int, rank: int, world: int) -> Range:
    """The part of `size` that a rank gets, as `torch.chunk` and DTensors cut it: the last may be shorter.

    Raises:
        UnsupportedError: some rank would get nothing. All ranks raise it.
    """
    first, last = (chunk_of_rank(size, of, world) for of in (0, world - 1))
    if last[0] == last[1]:
        raise UnsupportedError(
            f"{size} rows or columns of a quantized weight, {first[1]} for each, are too few for {world} processes: "
            "leave the module out of the plan, or use fewer processes"
        )
    return chunk_of_rank(size, rank, world)


def keep_ranges(module: QuantizedModule, leaf: str, dim: int, ranges: Sequence[Range], vectors: Sequence[str]) -> None:
    """Keep only `ranges` of dimension `dim` of the weight `leaf`, in their order, in new Parameters.

    Scales that are quantized are decoded to float32 first: their blocks of 256 would not begin where the slice does.

    Args:
        module: changed. Its state dict leaves the weights out from then on, see `is_sliced`.
        leaf: name of a quantized weight of it.
        dim: of the weight as it is stored, [..., N, K].
        ranges: along K, multiples of the format's `column_group`, or K.
        vectors: names of Parameters that are not quantized and are cut alike along their last dimension if `dim` is N,
            and along their first otherwise: biases. One that is None, or not there, is left alone.

    Raises:
        UnsupportedError: the weight has no memory here, is sharded already, or its rows share scales.
    """
    stored = module.stored_weight(leaf)
    dim %= len(stored.shape)
    _check_is_whole(module, leaf, stored.state["packed"])
    if stored.format.row_group > 1 and dim == len(stored.shape) - 2:
        raise UnsupportedError(
            f"the rows of format {stored.format.name!r} share scales, and {leaf!r} is not cut by rows"
        )
    part_format, state = stored.format.select(stored.state, stored.shape, slice(None))
    if dim == len(stored.shape) - 1:
        parts = [part_format.select_columns(state, *ends) for ends in ranges]
    else:
        parts = [{part: _narrow(tensor, dim, ends) for part, tensor in state.items()} for ends in ranges]
    for part in stored.state.keys() - state.keys():
        del module._parameters[state_name(leaf, part)]
    for part in state:
        kept = torch.cat([tensors[part] for tensors in parts], dim=dim) if len(parts) > 1 else parts[0][part].clone()
        module._parameters[state_name(leaf, part)] = nn.Parameter(kept.contiguous(), requires_grad=False)
    shape = list(stored.shape)
    shape[dim] = sum(stop - start for start, stop in ranges)
    for name in vectors:
        vector = module._parameters.get(name)
        if vector is not None:
            along = vector.dim() - 1 if dim == len(shape) - 2 else 0
            kept = torch.cat([_narrow(vector.detach(), along, ends) for ends in ranges], dim=along)
            module._parameters[name] = nn.Parameter(kept, requires_grad=vector.requires_grad)
    described = replace(module.descriptions[leaf], format=part_format, shape=tuple(shape))
    module._redescribe({leaf: described})
    if not is_sliced(module):
        module.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
    vars(module)["_sliced"] = (*vars(module).get("_sliced", ()), *vectors)


def is_sliced(module: nn.Module) -> bool:
    """Whether a module holds slices of its weights. Then `state_dict` leaves them out.

    Under the names of the whole weights, whoever saves one process's state would take it for that of all.
    """
    return "_sliced" in vars(module)


def refuse_slice(module: nn.Module) -> None:
    """Raise an UnsupportedError if `module`, which is to be cut, holds slices already."""
    if is_sliced(module):
        raise UnsupportedError(f"this {type(module).__name__} is parallelized already: {module}")


def refuse_slices(model: nn.Module) -> None:
    """Raise an UnsupportedError if `model`, which is to be saved, holds slices."""
    sliced = [name for name, module in model.named_modules() if is_sliced(module)]
    if sliced:
        raise UnsupportedError(
            f"the weights of {len(sliced)} modules ({sliced[0]} is the first) are slices of tensor or expert "
            "parallelism, and a slice is no checkpoint: save the model before you parallelize it"
        )


def _leave_out(module: QuantizedModule, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A hook, at the top of the file so that models pickle."""
    for name in (*module.state_spec(), *vars(module)["_sliced"]):
        state_dict.pop(prefix + name, None)


def _narrow(tensor: Tensor, dim: int, ends: Range) -> Tensor:
    return tensor.narrow(dim, ends[0], ends[1] - ends[0])


def _check_is_whole(module: QuantizedModule, leaf: str, packed: Tensor) -> None:
    shape = module.descriptions[leaf].shape
    if is_sharded(packed) or packed.is_meta:
        how = "is sharded (DTensor)" if is_sharded(packed) else "has no memory here: it is offloaded or on meta"
        raise UnsupportedError(
            f"the quantized {leaf!r} of shape {list(shape)} {how}, and cannot be cut: load the model onto one device "
            "of each process, parallelize it, and shard it with FSDP2 last"
        )
