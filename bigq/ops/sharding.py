"""Sharding: which placements of DTensors each op takes, so that products, decoding and quantizing work on shards.

A row of a weight is stored on its own, so an op on some rows of N gives the same rows of its result. A shard of columns
holds whole blocks. Where a shard would cut a block, of K or of the scales that double quantization groups by 256, the
tensors are gathered.

torch.distributed.tensor takes a second to import, so the rules are registered when bigq meets the first DTensor.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigq.ops.checks import NESTED_BLOCK_SIZE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

__all__ = [
    "chunk_of_rank",
    "from_shard",
    "gather_shards",
    "in_all",
    "is_cut_unevenly",
    "is_sharded",
    "local_part",
    "on_mesh",
    "placed_like",
    "register_rules",
    "replicated_like",
    "shard_width",
    "sharded_parameters",
    "whole_of",
]

Rule = tuple[list[Any], list[Any]]  # placements of the outputs, and of the arguments: None for those that are no tensor
Sharded = tuple[Any, dict[int, Any]]  # the outputs' placement, and that of arguments by position; others are replicated


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether `tensor` is a DTensor, for whose ops there have to be rules."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_parameters(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, parameter) of each DTensor among the parameters of `modules` themselves."""
    return [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]


def chunk_of_rank(size: int, rank: int, world: int) -> tuple[int, int]:
    """Where the part of a rank begins and ends, as DTensors are cut: the last ones may get fewer, or none."""
    step = -(-size // world)
    return min(rank * step, size), min((rank + 1) * step, size)


def on_mesh(shard: Tensor) -> Tensor:
    """The DTensor `shard` on the devices of its mesh, where it is kept on the CPU: NCCL sends what is on a GPU only."""
    kind: str = shard.device_mesh.device_type  # type: ignore[attr-defined]
    return shard if shard.device.type == kind else shard.to(kind)


def gather_shards(shard: Tensor) -> Tensor:
    """The whole tensor of the DTensor `shard`, on the device of its mesh. Every process of the mesh asks for it."""
    return on_mesh(shard.detach()).full_tensor()  # type: ignore[attr-defined, no-any-return]


def in_all(claim: bool, tensor: Tensor) -> bool:
    """Whether `claim` holds in every process that holds a part of `tensor`, each of which has to ask."""
    if not is_sharded(tensor):
        return claim
    from torch.distributed import ReduceOp, all_reduce

    told = torch.tensor(int(claim), device=tensor.device_mesh.device_type)  # type: ignore[attr-defined]
    for group in tensor.device_mesh.get_all_groups():  # type: ignore[attr-defined]
        all_reduce(told, ReduceOp.MIN, group)
    return bool(told)


def placed_like(tensor: Tensor, own: Tensor) -> Tensor:
    """A DTensor with the placements of the DTensor `own`, to be copied into it; any other tensor itself."""
    if not (is_sharded(tensor) and is_sharded(own)):
        return tensor
    return tensor.redistribute(own.device_mesh, own.placements)  # type: ignore[attr-defined, no-any-return]


def is_cut_unevenly(stack: Tensor) -> bool:
    """Whether a stack [E, ...] of matrices is a DTensor in shards of E that are not of one size.

    torch does not view such shards as matrices [E * N, K]. Each process views its own.
    """
    if not is_sharded(stack) or stack.dim() < 3:
        return False
    cuts = zip(stack.placements, stack.device_mesh.shape, strict=True)  # type: ignore[attr-defined]
    return bool(stack.shape[0] % prod(size for placement, size in cuts if placement.is_shard(0)))


def from_shard(own: Tensor, mesh: "DeviceMesh", placements: "Sequence[Placement]", shape: Sequence[int]) -> "DTensor":
    """The contiguous DTensor of `shape` of which this process has `own`, without a word to the others."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def whole_of(own: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """The DTensor of `shape`, in the shards of the DTensor `like`, of which this process has `own`."""
    return from_shard(own, like.device_mesh, like.placements, shape)  # type: ignore[attr-defined]


def replicated_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A plain `tensor`, which all processes have, as a DTensor on the mesh of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def shard_width(packed: Tensor, in_features: int) -> int | None:
    """K as an op takes it that decodes or multiplies by `packed`: None if that is a DTensor of an even K.

    torch passes an op's numbers on to each shard, and a shard of columns has fewer than K. From None, a shard takes its
    own number of columns, which is even.
    """
    return None if is_sharded(packed) and in_features % 2 == 0 else in_features


@cache
def register_rules() -> None:
    """Tell torch's DTensor the placements that each op of bigq takes."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole, summed = Replicate(), Partial()

    def rules(outputs: int, arguments: tuple[Any, ...], *sharded: Sharded) -> list[Rule]:
        """All replicated, or one of `sharded`."""
        made = []
        for out, placed in ((whole, {}), *sharded):
            placements = [
                None if not hasattr(argument, "placements") else placed.get(position, whole)
                for position, argument in enumerate(arguments)
            ]
            made.append(([out] * outputs, placements))
        return made

    def rule(name: str) -> Callable[[Callable[..., list[Rule]]], object]:
        op = getattr(torch.ops.bigq, name).default
        return register_sharding(op)  # type: ignore[no-any-return]

    def nested_by_rows(codes: Any) -> bool:
        """Whether each shard of rows of these scales [N, ...] begins with a block of 256."""
        ranks = codes.mesh.size()
        return bool(codes.shape[0] % ranks == 0 and codes.shape.numel() // ranks % NESTED_BLOCK_SIZE == 0)

    def cuts_at_blocks(packed: Any, block_size: int) -> bool:
        """Whether each shard of the columns of a 4-bit weight holds whole blocks."""
        return bool(2 * packed.shape[-1] % (packed.mesh.size() * block_size) == 0)

    @rule("quantize_4bit")
    def _(weight: Any, quant_type: str, block_size: int) -> list[Rule]:
        sharded = [(Shard(0), {0: Shard(0)})]
        if weight.shape[1] % (weight.mesh.size() * block_size) == 0:
            sharded.append((Shard(1), {0: Shard(1)}))
        return rules(2, (weight, quant_type, block_size), *sharded)

    @rule("search_scales_4bit")
    def _(weight: Any, importance: Any, *settings: Any) -> list[Rule]:
        return rules(1, (weight, importance, *settings), (Shard(0), {0: Shard(0)}))

    @rule("encode_scaled_4bit")
    def _(weight: Any, scales: Any, *settings: Any) -> list[Rule]:
        return rules(1, (weight, scales, *settings), (Shard(0), {0: Shard(0), 1: Shard(0)}))

    @rule("dequantize_4bit")
    def _(*arguments: Any) -> list[Rule]:
        weight, _, _, block_size, in_features, _ = arguments
        sharded = [(Shard(0), {0: Shard(0), 1: Shard(0)})]
        if in_features is None and cuts_at_blocks(weight, block_size):
            sharded.append((Shard(1), {0: Shard(1), 1: Shard(1)}))
        return rules(1, arguments, *sharded)

    @rule("quantize_absmax")
    def _(absmax: Any) -> list[Rule]:
        return rules(3, (absmax,))  # the offset is the mean of all scales

    @rule("dequantize_absmax")
    def _(codes: Any, nested_absmax: Any, nested_offset: Any) -> list[Rule]:
        sharded = [(Shard(0), {0: Shard(0), 1: Shard(0)})] if nested_by_rows(codes) else []
        return rules(1, (codes, nested_absmax, nested_offset), *sharded)

    @rule("linear_4bit")
    def _(*arguments: Any) -> list[Rule]:
        x, weight, absmax, _, nested_absmax, _, _, block_size, in_features = (*arguments, None)[:9]
        last = len(x.shape) - 1
        sharded: list[Sharded] = [(Shard(dim), {0: Shard(dim)}) for dim in range(last)]
        if nested_absmax is None or nested_by_rows(absmax):
            sharded.append((Shard(last), {1: Shard(0), 2: Shard(0), 3: Shard(0), 4: Shard(0)}))
        if nested_absmax is None and in_features is None and cuts_at_blocks(weight, block_size):
            sharded.append((summed, {0: Shard(last), 1: Shard(1), 2: Shard(1), 3: summed}))
        return rules(1, arguments, *sharded)

    def stack_rules(arguments: tuple[Any, ...]) -> list[Rule]:
        """For the products of x [S, K] with a stack [E, N, K]: by N, or by K."""
        _, _, packed, _, _, nested_absmax, _, _, block_size, in_features = (*arguments, None)[:10]
        sharded: list[Sharded] = []
        if nested_absmax is None:
            sharded.append((Shard(1), {2: Shard(1), 3: Shard(1), 4: Shard(1)}))
            if in_features is None and cuts_at_blocks(packed, block_size):
                sharded.append((summed, {0: Shard(1), 2: Shard(2), 3: Shard(2), 4: summed}))
        return rules(1, arguments, *sharded)

    @rule("grouped_linear_4bit")
    def _(*arguments: Any) -> list[Rule]:
        return stack_rules(arguments)

    @rule("routed_linear_4bit")
    def _(*arguments: Any) -> list[Rule]:
        return stack_rules(arguments)

    @rule("grouped_linear_4bit_backward")
    def _(*arguments: Any) -> list[Rule]:
        _, _, packed, _, nested_absmax, _, _, block_size, in_features = (*arguments, None)[:9]
        sharded: list[Sharded] = []
        if nested_absmax is None:
            sharded.append((summed, {0: Shard(1), 2: Shard(1), 3: Shard(1)}))
            if in_features is None and cuts_at_blocks(packed, block_size):
                sharded.append((Shard(1), {2: Shard(2), 3: Shard(2)}))
        return rules(1, arguments, *sharded)

    @rule("grouped_matmul")
    def _(x: Any, stops: Any, dense: Any) -> list[Rule]:
        return rules(1, (x, stops, dense), (Shard(1), {2: Shard(2)}), (summed, {0: Shard(1), 2: Shard(1)}))

    @rule("quantize_int8")
    def _(weight: Any) -> list[Rule]:
        return rules(2, (weight,), (Shard(0), {0: Shard(0)}))

    @rule("dequantize_int8")
    def _(weight: Any, absmax: Any, dtype: Any) -> list[Rule]:
        by_rows, by_columns = {0: Shard(0), 1: Shard(0)}, {0: Shard(1)}
        return rules(1, (weight, absmax, dtype), (Shard(0), by_rows), (Shard(1), by_columns))

    @rule("linear_int8")
    def _(*arguments: Any) -> list[Rule]:
        x, _, _, _, threshold = arguments
        last = len(x.shape) - 1
        sharded: list[Sharded] = [(Shard(last), {1: Shard(0), 2: Shard(0), 3: Shard(0)})]
        # Each shard of a row of x is rounded by its own largest magnitude, which is no larger than that of the row.
        sharded.append((summed, {0: Shard(last), 1: Shard(1), 3: summed}))
        if not threshold:  # which columns are outliers depends on all tokens
            sharded += [(Shard(dim), {0: Shard(dim)}) for dim in range(last)]
        return rules(1, arguments, *sharded)

    def int8_stack_rules(arguments: tuple[Any, ...]) -> list[Rule]:
        """For the products of x [S, K] with a stack [E, N, K] in int8: by N."""
        return rules(1, arguments, (Shard(1), {2: Shard(1), 3: Shard(1), 4: Shard(1)}))

    @rule("grouped_linear_int8")
    def _(*arguments: Any) -> list[Rule]:
        return int8_stack_rules(arguments)

    @rule("routed_linear_int8")
    def _(*arguments: Any) -> list[Rule]:
        return int8_stack_rules(arguments)

    @rule("grouped_linear_int8_backward")
    def _(*arguments: Any) -> list[Rule]:
        by_rows, by_columns = {0: Shard(1), 2: Shard(1), 3: Shard(1)}, {2: Shard(2)}
        return rules(1, arguments, (summed, by_rows), (Shard(1), by_columns))
