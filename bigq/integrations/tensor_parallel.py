"""torch's column-wise and row-wise styles for quantized linears, and its `parallelize_module`.

The names and arguments are those of `torch.distributed.tensor.parallel`. A quantized module keeps its slice as plain
tensors and computes with the kernels of one process, so a call without a gradient costs one all-reduce for a row-wise
linear and nothing for a column-wise one. Modules that are not quantized, such as the output head, get torch's style.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor import parallel as torch_styles
from torch.distributed.tensor.parallel import ParallelStyle

from bigq.errors import ConfigError, UnsupportedError
from bigq.integrations.collectives import local_result, placed, summed, with_summed_gradients
from bigq.integrations.sharded_rows import gather_rows
from bigq.weight.linear import QuantizedMatrix
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.slices import keep_ranges, range_of_rank, refuse_slice

__all__ = ["ColwiseParallel", "RowwiseParallel", "parallelize_module"]


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
        gather_rows(module)
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
        is_whole = have == Replicate()

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            if is_whole and not isinstance(x, DTensor):
                return (*with_summed_gradients(group, x), *rest)
            whole = placed(x, device_mesh, have, Replicate(), width)
            return (whole.to_local(grad_placements=[Partial()]), *rest)

        def leave(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            laid = placed(out, device_mesh, Shard(-1), out_layout, features)
            return local_result(laid) if use_local else laid

        matrix.register_forward_pre_hook(enter)
        if out_layout != Shard(-1) or not use_local:
            matrix.register_forward_hook(leave)
        return matrix


class RowwiseParallel(torch_styles.RowwiseParallel):
    """Each process keeps some columns of the weight [N, K] of a quantized linear, and an all-reduce adds the outputs.

    The arguments are those of torch's style. A weight is cut between blocks, so K divided by the processes has to be a
    multiple of `block_size`; int8 is cut anywhere, and keeps the scales of whole rows. Otherwise the rows are cut: each
    process gets the whole input and computes some features, and all get the output. That needs no more memory, and
    moves K + N numbers a token instead of 2 N. Of a layer of a PEFT adapter, `lora_A` is cut by columns, and `lora_B`
    becomes the same in all processes.

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
        gather_rows(module)
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
        is_cut, is_summed = have == Shard(-1), out_layout == Replicate() and use_local

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            if is_cut and not isinstance(x, DTensor):
                return args
            return (placed(x, device_mesh, have, Shard(-1), width).to_local(), *rest)

        def leave(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            bias = module._parameters.get(_SUMMED_BIAS)
            if is_summed:
                total = summed(out, group)
                return total if bias is None else total + bias.to(total.dtype)
            laid: Tensor = placed(out, device_mesh, Partial(), out_layout, features)
            if bias is not None:
                laid = laid + DTensor.from_local(bias.to(out.dtype), device_mesh, [Replicate()], run_check=False)
            return local_result(laid) if use_local else laid

        matrix.register_forward_pre_hook(enter)
        matrix.register_forward_hook(leave)
        return matrix


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh | None = None,
    parallelize_plan: ParallelStyle | Mapping[str, ParallelStyle] | None = None,
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """torch's `parallelize_module`, for a model with quantized weights: the plan of the float model works unchanged.

    torch's column-wise and row-wise styles in the plan become those of this file, with the same layouts. Load the whole
    model in each process, or with `shard_rows`; add an adapter if there is to be one, parallelize, and call
    `fully_shard` last.

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
    torch_styles.parallelize_module(module, device_mesh, plan, src_data_rank=src_data_rank)
    for child in module.modules():  # what the plan leaves out is whole in each process
        gather_rows(child)
    return module


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
    refuse_slice(module)
    return module


def _parts(parts: int | Sequence[int], features: int) -> list[tuple[int, int]]:
    """(first row, rows) of each part."""
    sizes = [features // parts] * parts if isinstance(parts, int) else list(parts)
    if sum(sizes) != features or not all(size > 0 for size in sizes):
        raise ConfigError(f"parts={parts!r} of a weight with {features} rows: the rows of the parts do not add up")
    return list(zip(accumulate([0, *sizes[:-1]]), sizes, strict=True))


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
    return local_result(out)
