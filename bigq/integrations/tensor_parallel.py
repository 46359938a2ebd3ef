"""torch's parallel styles for quantized modules: tensor parallelism of linears, and expert parallelism.

The names and arguments are those of `torch.distributed.tensor.parallel`. A quantized module keeps its slice as plain
tensors and computes with the kernels of one process, so a call without a gradient costs one all-reduce for a row-wise
linear and nothing for a column-wise one. Modules that are not quantized, such as the output head, get torch's style.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_styles
from torch.distributed.tensor.parallel import ParallelStyle

from bigq.errors import ConfigError, UnsupportedError
from bigq.interop.expert_adapters import adapted_module
from bigq.weight.convert import original_class
from bigq.weight.experts import IMPLEMENTATIONS
from bigq.weight.linear import QuantizedMatrix
from bigq.weight.low_rank import Changes
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.slices import is_sliced, keep_ranges, range_of_rank

__all__ = ["ColwiseParallel", "ExpertParallel", "RowwiseParallel", "parallelize_module"]

Group = dist.ProcessGroup


class ColwiseParallel(torch_styles.ColwiseParallel):
    """Each process keeps some rows of the weight [N, K] of a quantized linear, and computes those outputs.

    The arguments that torch's style has mean the same here. Double-quantized scales are decoded to float32, which takes
    4.5 bits a number instead of 4.13: the mean that they were quantized around is that of the whole weight. A layer of
    a PEFT adapter is cut with its `base_layer`: `lora_B` by rows, and `lora_A` becomes the same in all processes. The
    adapter's Parameters are DTensors then: `clip_grad_norm_` finds the norm of all, and `full_tensor()` gathers them.

    Args:
        parts: how many weights of equal size the module's weight is made of, or the rows of each: 2 for a `gate_up`,
            (4096, 1024, 1024) for a `qkv`. Each is cut by itself.
        input_layouts: of the input. None: every process has the whole input.
        output_layouts: of the output. None: every process has its features.
        use_local_output: whether the output is a plain tensor instead of a DTensor.

    Raises:
        ConfigError: with `parts`, another layout of the output is asked for, or the rows of the parts do not add up.
        UnsupportedError: the module is an embedding, is offloaded or sharded, or has fewer rows than processes.
    """

    def __init__(
        self,
        *,
        parts: int | Sequence[int] = 1,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        self.parts = parts
        if parts != 1 and (self.output_layouts != (Shard(-1),) or not use_local_output):
            raise ConfigError(
                f"parts={parts!r} with another output than local features: their order is that of no layout"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if _is_adapted(module):
            return _apply_to_tuner(self, module, device_mesh, cut="lora_B")
        if not isinstance(module, QuantizedModule):
            if self.parts != 1:
                raise UnsupportedError(f"parts={self.parts!r} of a {type(module).__name__} that is not quantized")
            return super()._apply(module, device_mesh)
        matrix, group = _matrix(module), device_mesh.get_group()
        features, width = matrix.description.shape
        rank, world = device_mesh.get_local_rank(), device_mesh.size()
        ranges = [
            (first + start, first + stop)
            for first, rows in _parts(self.parts, features)
            for start, stop in (range_of_rank(rows, rank, world),)
        ]
        keep_ranges(matrix, "weight", -2, ranges, ["bias"])
        have, out_layout, use_local = self.input_layouts[0], self.output_layouts[0], self.use_local_output

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            if have == Replicate() and not isinstance(x, DTensor):
                return (*_sum_of_gradients(group, x), *rest)
            whole = _relaid(x, device_mesh, have, Replicate(), width)
            return (whole.to_local(grad_placements=[Partial()]), *rest)

        def leave(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            if out_layout == Shard(-1) and use_local:
                return out
            laid = _relaid(out, device_mesh, Shard(-1), out_layout, features)
            return laid.to_local() if use_local else laid

        return _with_hooks(matrix, enter, leave)


class RowwiseParallel(torch_styles.RowwiseParallel):
    """Each process keeps some columns of the weight [N, K] of a quantized linear, and an all-reduce adds the outputs.

    The arguments are those of torch's style. A weight is cut between blocks, so K divided by the processes has to be a
    multiple of `block_size`; int8 is cut anywhere, and keeps the scales of whole rows. Otherwise the rows are cut: each
    process gets the whole input and computes some features, and all get the output. That needs no more memory, and
    moves K + N numbers a token instead of 2 N. `RowwiseParallel` of a layer of a PEFT
    adapter cuts `lora_A` by columns, and makes `lora_B` the same in all processes.

    Args:
        input_layouts: of the input. None: every process has its features.
        output_layouts: of the output. None: every process has the whole output.
        use_local_output: whether the output is a plain tensor instead of a DTensor.

    Raises:
        UnsupportedError: the module is an embedding, is offloaded or sharded, or is too small for so many processes.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if _is_adapted(module):
            return _apply_to_tuner(self, module, device_mesh, cut="lora_A")
        if not isinstance(module, QuantizedModule):
            return super()._apply(module, device_mesh)
        matrix, group = _matrix(module), device_mesh.get_group()
        features, width = matrix.description.shape
        have, out_layout, use_local = self.input_layouts[0], self.output_layouts[0], self.use_local_output
        ends = range_of_rank(width, device_mesh.get_local_rank(), device_mesh.size())
        column_group = matrix.format.column_group
        step = -(-width // device_mesh.size())
        if column_group is None or step % column_group:
            layouts = {"input_layouts": have, "output_layouts": out_layout, "use_local_output": use_local}
            return ColwiseParallel(**layouts)._apply(module, device_mesh)  # type: ignore[arg-type]
        keep_ranges(matrix, "weight", -1, [ends], [])
        bias = matrix._parameters.get("bias")
        if bias is not None:  # added once, to the sum
            matrix._parameters["bias"] = None
            matrix.register_parameter(_SUMMED_BIAS, bias)

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            if have == Shard(-1) and not isinstance(x, DTensor):
                return args
            return (_relaid(x, device_mesh, have, Shard(-1), width).to_local(), *rest)

        def leave(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            bias = module._parameters.get(_SUMMED_BIAS)
            if out_layout == Replicate() and use_local:
                total = _sum(out, group)
                return total if bias is None else total + bias.to(total.dtype)
            laid: Tensor = _relaid(out, device_mesh, Partial(), out_layout, features)
            if bias is not None:
                laid = laid + DTensor.from_local(bias.to(out.dtype), device_mesh, [Replicate()], run_check=False)
            return laid.to_local() if use_local else laid  # type: ignore[attr-defined]

        return _with_hooks(matrix, enter, leave)


class ExpertParallel(ParallelStyle):
    """Each process keeps some experts of a layer, computes them for all tokens, and an all-reduce adds the outputs.

    For fused experts [E, N, K] of transformers whose weights are quantized, called with the hidden states, the experts
    of each token and their weights. E need not be a multiple of the processes. Every process has the same tokens. LoRA
    of PEFT on the experts stays whole in each process, as DTensors, and its gradients are those of all.

    Raises:
        UnsupportedError: the module is none of these, has fewer experts than there are processes, or is offloaded.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts: Any = adapted_module(module) or module
        count = getattr(experts, "num_experts", None)
        kind = type(experts).__name__
        if not isinstance(experts, QuantizedModule) or not isinstance(count, int):
            raise UnsupportedError(f"ExpertParallel is for fused experts with quantized weights, and this is a {kind}")
        rank, world, group = device_mesh.get_local_rank(), device_mesh.size(), device_mesh.get_group()
        start, stop = count * rank // world, count * (rank + 1) // world
        _check_unsliced(experts)
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
        arguments = signature(original_class(experts).forward)

        def enter(
            experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            changes: Changes = kwargs.pop("changes", {})
            bound = arguments.bind(experts, *args, **kwargs).arguments
            hidden, ids, weights, *rest = list(bound.values())[1:]
            factors = [
                _local(f) for of_leaf in changes.values() for change in of_leaf for f in (change.down, change.up)
            ]
            hidden, weights, *factors = _sum_of_gradients(group, hidden, weights, *factors)
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
            return _sum(out, group, args[0])

        experts.register_forward_pre_hook(enter, with_kwargs=True)
        experts.register_forward_hook(leave)
        return module


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh | None = None,
    parallelize_plan: ParallelStyle | Mapping[str, ParallelStyle] | None = None,
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """torch's `parallelize_module`, for a model with quantized weights: the plan of the float model works unchanged.

    torch's column-wise and row-wise styles in the plan become those of this file, with the same layouts. Load the whole
    model in each process, add an adapter if there is to be one, parallelize, and call `fully_shard` last.

    Args:
        module: changed; all processes of the mesh have equal weights.
        device_mesh: of one dimension. None: that of the context, as in torch.
        parallelize_plan: a style, or {name or pattern of a submodule: style}.
        src_data_rank: which process's float weights torch's styles scatter.

    Returns:
        `module`.

    Raises:
        UnsupportedError: a style cannot cut a module; its documentation says which.

    Example:
        >>> import bigq, torch
        >>> from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
        >>> from bigq.integrations.tensor_parallel import parallelize_module
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> config = bigq.QuantizationConfig("nf4", skip_modules=[])
        >>> model = bigq.load_and_quantize_model(model, None, config, device_map="cpu")
        >>> model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        >>> model(torch.ones(2, 64)).shape
        torch.Size([2, 64])
        >>> torch.distributed.destroy_process_group()
    """
    plan: Any = parallelize_plan
    if isinstance(plan, Mapping):
        plan = {name: _style(style) for name, style in plan.items()}
    elif plan is not None:
        plan = _style(plan)
    return torch_styles.parallelize_module(module, device_mesh, plan, src_data_rank=src_data_rank)


_SUMMED_BIAS = "summed_bias"


def _style(style: ParallelStyle) -> ParallelStyle:
    kinds: dict[type, type] = {
        torch_styles.ColwiseParallel: ColwiseParallel,
        torch_styles.RowwiseParallel: RowwiseParallel,
    }
    kind = kinds.get(type(style))
    if kind is None:
        return style
    given: Any = style
    return kind(  # type: ignore[no-any-return]
        input_layouts=given.input_layouts[0],
        output_layouts=given.output_layouts[0],
        use_local_output=given.use_local_output,
    )


def _matrix(module: QuantizedModule) -> QuantizedMatrix:
    if not isinstance(module, QuantizedMatrix):
        raise UnsupportedError(
            f"a {type(module).__name__} is not cut by rows or columns, which is for linears: leave it out of the plan"
        )
    _check_unsliced(module)
    return module


def _check_unsliced(module: QuantizedModule) -> None:
    if is_sliced(module):
        raise UnsupportedError(f"this {type(module).__name__} is parallelized already: {module}")


def _parts(parts: int | Sequence[int], features: int) -> list[tuple[int, int]]:
    """(first row, rows) of each part."""
    sizes = [features // parts] * parts if isinstance(parts, int) else list(parts)
    if sum(sizes) != features or not all(size > 0 for size in sizes):
        raise ConfigError(f"parts={parts!r} of a weight with {features} rows: the rows of the parts do not add up")
    return list(zip(accumulate([0, *sizes[:-1]]), sizes, strict=True))


def _with_hooks(module: nn.Module, enter: Any, leave: Any) -> nn.Module:
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    return module


def _relaid(x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, size: int) -> DTensor:
    """`x` as a DTensor in the layout `want`; `have` is that of a plain tensor whose last dimension is `size` in all."""
    if not isinstance(x, DTensor):
        shape = torch.Size((*x.shape[:-1], size))
        by_features = have in (Shard(-1), Shard(x.dim() - 1))  # the last process may have fewer
        whole = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()} if by_features else {}
        x = DTensor.from_local(x, mesh, [have], run_check=False, **whole)  # type: ignore[arg-type]
    return x.redistribute(placements=[want])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), QuantizedModule)


def _apply_to_tuner(
    style: "ColwiseParallel | RowwiseParallel", module: nn.Module, mesh: DeviceMesh, *, cut: str
) -> nn.Module:
    """Parallelize a LoRA layer of PEFT: `cut` names the adapter's linears that are cut as the base layer is."""
    usual = (Replicate(), Shard(-1)) if cut == "lora_B" else (Shard(-1), Replicate())
    adapters = {name: getattr(module, name, None) for name in ("lora_A", "lora_B")}
    others = [
        name
        for name, child in module.named_children()
        if name not in (*adapters, "base_layer") and [*child.parameters()]
    ]
    if (
        (style.input_layouts[0], style.output_layouts[0]) != usual
        or not style.use_local_output
        or others
        or not all(isinstance(linears, nn.ModuleDict) for linears in adapters.values())
    ):
        raise UnsupportedError(
            f"a {type(module).__name__} is parallelized if it is a LoRA layer with no more than lora_A and lora_B "
            f"(this one has {others}), and the style has the default layouts: name its base_layer in the plan, and "
            "what else it holds"
        )
    style._apply(module.base_layer, mesh)  # type: ignore[arg-type]
    for name, linears in adapters.items():
        for linear in linears.values():  # type: ignore[union-attr]
            if name == cut:
                kind = torch_styles.ColwiseParallel if cut == "lora_B" else torch_styles.RowwiseParallel
                kind()._apply(linear, mesh)
            else:
                distribute_module(linear, mesh, None, _enter_replicated, _leave_replicated)  # type: ignore[arg-type]
    return module


def _enter_replicated(module: nn.Module, args: tuple[Tensor, ...], mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)


def _leave_replicated(module: nn.Module, out: DTensor, mesh: DeviceMesh) -> Tensor:
    return out.to_local()


class _SumOfGradients(torch.autograd.Function):
    """One node for all inputs of a module, so that every process sums their gradients in one order."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(
            _reduced(grad.clone(), ctx.group) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)
        )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *entered: Tensor) -> Tensor:
        ctx.save_for_backward(*entered)
        return _reduced(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def _sum_of_gradients(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors`, which all processes have; the gradient of each is the sum of theirs."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return tensors
    return _SumOfGradients.apply(group, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def _sum(x: Tensor, group: Group, *entered: Tensor) -> Tensor:
    """The sum of the processes' `x`, which is a new tensor and may be overwritten; all have its gradient.

    `entered` are results of `_sum_of_gradients` that `x` may not depend on in some process: where it has none of the
    experts that tokens go to. The others would wait for its gradients.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in entered)):
        return _Sum.apply(x, group, *entered)  # type: ignore[no-any-return, no-untyped-call]
    return _reduced(x, group)


def _reduced(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x
