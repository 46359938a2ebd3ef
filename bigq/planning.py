"""make_plan: decide what becomes of every tensor of a model, before anything is read or changed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from bigq.checkpoint import StoredTensor
from bigq.config import QuantizationConfig
from bigq.errors import CheckpointError, ConfigError, UnsupportedError
from bigq.fit import Fit
from bigq.formats import Description
from bigq.linear import QuantizedLinear
from bigq.model_tensors import ModelTree, tensor_name
from bigq.plan import Plan, PlannedLinear
from bigq.selection import is_transposed_linear, match_patterns, select_linears

__all__ = ["make_plan", "quantized_prefixes"]


def quantized_prefixes(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """{module name: name of its quant_state} for the weights that a checkpoint holds quantized."""
    states = [name for name in tensors if name.rpartition(".")[2] == "quant_state"]
    return {name.rpartition(".")[0]: name for name in states}


def make_plan(
    tree: ModelTree,
    tensors: Mapping[str, StoredTensor],
    config: QuantizationConfig | None,
    *,
    quantized: Mapping[str, Description] | None = None,
    unquantized: Callable[[str], bool] = lambda name: False,
    offload_dtype: Callable[[str], torch.dtype | None] = lambda name: None,
    strict: bool = True,
) -> Plan:
    """Fit `tensors` to the model of `tree` under `config`; reads nothing and changes nothing.

    Args:
        tensors: what the checkpoint holds.
        config: None only where the checkpoint is quantized.
        quantized: descriptions of the weights that the checkpoint holds quantized, by module name.
        unquantized: whether a module's placement asks for its weight not to be quantized.
        offload_dtype: the dtype that a tensor's placement asks for, or None.
        strict: also refuse tensors that the model has no place for, and tensors that only the model has.

    Raises:
        CheckpointError: one error with everything that is missing, unexpected or misshapen.
        ConfigError: `config` does not fit the model or contradicts the checkpoint.
    """
    if any(isinstance(module, QuantizedLinear) for module in tree.aliases):
        raise UnsupportedError("the model already holds QuantizedLinear modules: load into a model built anew")
    if quantized:
        linears = _quantized_linears(tree, quantized, config)
        kept: Mapping[str, str] = {}
    elif config is None:
        raise ConfigError("the checkpoint is not quantized: pass a quantization_config")
    else:
        linears, kept = _chosen_linears(tree, tensors, config, unquantized)
    fit = Fit(tree=tree, tensors=tensors, config=config, offload_dtype=offload_dtype, strict=strict)
    for linear in linears:
        fit.claim(linear)
    planned_tensors = tuple(fit.tensors_outside(linears))
    fit.refuse()
    return Plan(tensors=planned_tensors, linears=tuple(linears), kept=kept)


def _chosen_linears(
    tree: ModelTree,
    tensors: Mapping[str, StoredTensor],
    config: QuantizationConfig,
    unquantized: Callable[[str], bool],
) -> tuple[list[PlannedLinear], dict[str, str]]:
    selection = select_linears(
        tree.model,
        skip_modules=config.skip_modules,
        keep_in_fp32_modules=config.keep_in_fp32_modules,
        defaults=config.skip_defaults,
        tree=tree,
    )
    kept, linears, weight_format = dict(selection.kept), [], config.weight_format()
    descriptions: dict[tuple[tuple[int, int], torch.dtype], Description] = {}  # one for all linears that look alike
    for name, aliases in selection.linears.items():
        if unquantized(name):
            kept[name] = "offloaded with its dtype"
            continue
        module = cast(nn.Linear, tree.modules[name])  # or a Conv1D, which has the same two parameters
        source = _source(aliases, tensors)
        info = tensors.get(source)
        looks = _matrix_shape(module), info.dtype if info is not None else module.weight.dtype
        if looks not in descriptions:
            descriptions[looks] = Description(
                format=weight_format, shape=looks[0], dtype=looks[1], compute_dtype=config.compute_dtype
            )
        linears.append(_planned_linear(module, aliases, descriptions[looks], source))
    if not selection.linears:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in kept.items()) or "  it has no nn.Linear or Conv1D"
        raise UnsupportedError(f"nothing to quantize in {type(tree.model).__name__}:\n{reasons}")
    return linears, kept


def _quantized_linears(
    tree: ModelTree,
    quantized: Mapping[str, Description],
    config: QuantizationConfig | None,
) -> list[PlannedLinear]:
    """The linears that the checkpoint holds quantized, with its descriptions."""
    if config is not None:
        for field in ("skip_modules", "keep_in_fp32_modules"):
            for name, pattern in match_patterns(field, getattr(config, field), tree.names()).items():
                owner, _, leaf = name.rpartition(".")
                linear = owner if leaf == "weight" else name
                if linear in quantized:
                    raise ConfigError(f"{field} {pattern!r} matches {linear}, which the checkpoint holds quantized")
    linears, problems = [], []
    for name, description in quantized.items():
        found = tree.modules.get(name)
        if found is None or not (isinstance(found, nn.Linear) or is_transposed_linear(found)):
            problems.append(f"  {name or 'the whole'} is quantized in the checkpoint, and no linear of the model")
            continue
        module = cast(nn.Linear, found)
        shape = _matrix_shape(module)
        if shape != description.shape:
            problems.append(f"  {name}: expected shape {list(shape)}, found {list(description.shape)}")
        if config is not None and config.weight_format() != description.format:
            raise ConfigError(
                f"{name}: the checkpoint holds {description.format.describe()}, the quantization_config asks for "
                f"{config.weight_format().describe()}; drop the config, or quantize from the original weights"
            )
        if config is not None and config.compute_dtype is not None:
            description = replace(description, compute_dtype=config.compute_dtype)
        linears.append(_planned_linear(module, tree.aliases[module], description, None))
    if problems:
        raise CheckpointError("the quantized checkpoint does not fit the model:\n" + "\n".join(problems))
    return linears


def _source(names: tuple[str, ...], tensors: Mapping[str, StoredTensor]) -> str:
    """The name under which the checkpoint holds the weight of a linear, or the first of its names where it does not."""
    weights = [tensor_name(name, "weight") for name in names]
    return next(filter(tensors.__contains__, weights), weights[0]) if len(weights) > 1 else weights[0]


def _matrix_shape(module: nn.Linear) -> tuple[int, int]:
    """(out_features, in_features); a Conv1D stores the transpose."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed_linear(module) else (rows, columns)


def _planned_linear(
    module: nn.Linear, names: tuple[str, ...], description: Description, source: str | None
) -> PlannedLinear:
    return PlannedLinear(names=names, description=description, source=source, transposed=is_transposed_linear(module))
