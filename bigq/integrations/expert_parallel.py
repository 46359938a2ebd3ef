"""ExpertParallel: a style of torch's `parallelize_module` by which each process keeps some experts of a layer."""

from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional

from bigq.errors import UnsupportedError
from bigq.integrations.collectives import Group, summed, with_summed_gradients
from bigq.integrations.sharded_rows import gather_rows
from bigq.interop.expert_adapters import adapted_module
from bigq.model.experts import has_rows_for_each_expert
from bigq.ops.sharding import local_part
from bigq.weight.convert import original_class
from bigq.weight.experts import IMPLEMENTATIONS, QuantizedExperts
from bigq.weight.linear import QuantizedMatrix
from bigq.weight.low_rank import Changes
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.slices import keep_ranges, refuse_slice

__all__ = ["ExpertParallel"]


class ExpertParallel(ParallelStyle):
    """Each process keeps some experts of a layer, computes them for all tokens, and an all-reduce adds the outputs.

    For fused experts [E, N, K] of transformers whose weights are quantized, called with the hidden states, the experts
    of each token and their weights, or as Llama4's with the rows of each expert. E need not be a multiple of the
    processes. Every process has the same tokens. LoRA of PEFT on the experts stays whole in each process, as DTensors,
    and its gradients are those of all.

    Raises:
        UnsupportedError: the module is none of these, has fewer experts than there are processes, or is offloaded, or
            has adapters and a forward that takes none.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts: Any = adapted_module(module) or module
        count = getattr(experts, "num_experts", None)
        kind, takes_all_rows = original_class(experts).__name__, has_rows_for_each_expert(experts)
        if not isinstance(experts, QuantizedModule) or isinstance(experts, QuantizedMatrix):
            raise UnsupportedError(f"ExpertParallel is for fused experts with quantized weights, and this is a {kind}")
        if not (isinstance(experts, QuantizedExperts) or takes_all_rows) or not isinstance(count, int):
            raise UnsupportedError(f"ExpertParallel cannot cut a {kind}: its forward is not that of most fused experts")
        if takes_all_rows and module is not experts:
            raise UnsupportedError(f"ExpertParallel cannot cut the experts of a {kind} with adapters: leave these out")
        rank, world, group = device_mesh.get_local_rank(), device_mesh.size(), device_mesh.get_group()
        start, stop = count * rank // world, count * (rank + 1) // world
        refuse_slice(experts)
        gather_rows(experts)
        if count < world:
            raise UnsupportedError(f"{count} experts of a {kind} are too few for {world} processes")
        stacks = [leaf for leaf, description in experts.descriptions.items() if description.shape[0] == count]
        others = {name: p for name, p in experts.named_parameters(recurse=False) if name not in experts.state_spec()}
        if len(stacks) < len(experts.descriptions) or any(len(p) != count for p in others.values()):
            raise UnsupportedError(
                f"not every parameter of a {kind} has {count} entries, one for each expert: {experts}"
            )
        for leaf in stacks:
            keep_ranges(experts, leaf, 0, [(start, stop)], sorted(others) if leaf == stacks[0] else [])
        layer = module
        while layer is not experts:  # a layer of PEFT for each weight
            for linears in (layer.lora_A, layer.lora_B):
                for linear in linears.values():  # type: ignore[operator]
                    linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, device_mesh, [Replicate()]))
            layer = layer.base_layer  # type: ignore[assignment]
        vars(experts).update(num_experts=stop - start, _is_expert_parallel=True)  # for transformers' own products
        if takes_all_rows:
            _keep_rows(experts, group, count, start, stop)
            return module
        arguments = signature(original_class(experts).forward)

        def enter(
            experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            changes: Changes = kwargs.pop("changes", {})
            bound = arguments.bind(experts, *args, **kwargs).arguments
            hidden, ids, weights, *rest = list(bound.values())[1:]
            factors = [
                local_part(f) for of_leaf in changes.values() for change in of_leaf for f in (change.down, change.up)
            ]
            hidden, weights, *factors = with_summed_gradients(group, hidden, weights, *factors)
            own = iter(factor[start:stop] for factor in factors)
            changes = {
                leaf: [replace(change, down=next(own), up=next(own)) for change in of_leaf]
                for leaf, of_leaf in changes.items()
            }
            elsewhere = (ids < start) | (ids >= stop)
            # Products of stacks skip an id of no expert. Others multiply such a row by 0.
            implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
            no_expert = stop - start if implementation in IMPLEMENTATIONS else 0
            ids = torch.where(elsewhere, no_expert, ids - start)
            given = (hidden, ids, weights.masked_fill(elsewhere, 0), *rest)
            return given, {"changes": changes} if changes else {}

        def leave(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return summed(out, group, args[0])

        experts.register_forward_pre_hook(enter, with_kwargs=True)
        experts.register_forward_hook(leave)
        return module


def _keep_rows(experts: nn.Module, group: Group, count: int, start: int, stop: int) -> None:
    """Let `experts`, which take [E * T, H], take the rows of theirs from `start` to `stop`, and return all rows."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (hidden,) = (*args, *kwargs.values())
        (hidden,) = with_summed_gradients(group, hidden)
        return (hidden.view(count, -1, hidden.shape[-1])[start:stop].flatten(0, 1),), {}

    def leave(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        rows = out.view(stop - start, -1, out.shape[-1])
        return summed(functional.pad(rows, (0, 0, 0, 0, start, count - stop)).flatten(0, 1), group, args[0])

    experts.register_forward_pre_hook(enter, with_kwargs=True)
    experts.register_forward_hook(leave)
