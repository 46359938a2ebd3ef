"""The layouts of saved weights: which tensors, under which names, stand for the quantized weights of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from bigq.checkpoint.safetensors_file import DTYPE_NAMES
from bigq.errors import ConfigError, UnsupportedError
from bigq.formats import QUANT_STATE, state_name
from bigq.interop.transformers_model import is_transformers_model
from bigq.interop.transformers_names import names_in_files
from bigq.model.tree import is_dense, tensor_name
from bigq.ops.sharding import is_sharded
from bigq.saving import bitsandbytes, compressed_tensors
from bigq.saving.saved_weight import SavedWeight, kept_linears, quantized_weights, with_rows
from bigq.saving.separated import separated
from bigq.system.text import shortlist
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["LAYOUTS", "OWN", "Saved", "check_layout", "foreign_tensors", "in_layout"]


class _Foreign(NamedTuple):
    """How another library stores weights: the functions of the file of its name."""

    check: Callable[..., None]
    tensors: Callable[[SavedWeight], dict[str, Tensor]]
    quantization_config: Callable[[Sequence[SavedWeight], Sequence[str]], dict[str, object]]


OWN = "bigq"
LAYOUTS: dict[str, _Foreign | None] = {
    OWN: None,
    bitsandbytes.LAYOUT: _Foreign(bitsandbytes.check, bitsandbytes.tensors, bitsandbytes.quantization_config),
    compressed_tensors.LAYOUT: _Foreign(
        compressed_tensors.check, compressed_tensors.tensors, compressed_tensors.quantization_config
    ),
}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What is saved of a model.

    Args:
        tensors: by name in the files, tied ones under all of their names.
        weights: the quantized weights, by name in the model.
        quantization_config: what config.json says of a foreign layout; None in bigq's own.
        names: {name in the model: name in the files} where they differ.
    """

    tensors: Mapping[str, Tensor]
    weights: Sequence[SavedWeight]
    quantization_config: dict[str, object] | None
    names: Mapping[str, str] = field(default_factory=dict)


def check_layout(layout: str) -> None:
    """Raise a ConfigError unless there is a layout of that name."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; expected one of {list(LAYOUTS)}")


def in_layout(model: nn.Module, layout: str, *, on_meta: bool = False) -> Saved:
    """The tensors of a quantized model as `layout` stores them; views of the model's where they can be.

    Args:
        on_meta: take tensors on meta, too. A scale that a layout writes as text has to have a number all the same.

    Raises:
        UnsupportedError: the model holds no quantized weight, or what cannot be saved, or a weight that the layout
            cannot hold.
    """
    foreign, weights = LAYOUTS[layout], quantized_weights(model)
    if not weights:
        raise UnsupportedError(f"{type(model).__name__} holds no quantized weight: save it with its own library")
    state = model.state_dict()
    _refuse_unsaved(state, on_meta=on_meta)
    if foreign is not None:
        weights = with_rows(model, weights)
        foreign.check(weights, in_transformers=is_transformers_model(model))
        tensors = _replaced(model, state, weights, foreign)
        # with experts one by one, files are those of other releases of transformers, where other names differ, too
        names = names_in_files(model, tensors) if any(weight.rows for weight in weights) else {}
        kept = [tensor_name(name, "weight") for name in kept_linears(model)]
        kept = [names.get(name, name).rpartition(".")[0] for name in kept]
        return Saved(
            tensors={names.get(name, name): tensor for name, tensor in tensors.items()},
            weights=weights,
            quantization_config=foreign.quantization_config(weights, kept),
            names=names,
        )
    return Saved(tensors=state, weights=weights, quantization_config=None)


def foreign_tensors(layout: str, weight: SavedWeight) -> dict[str, Tensor] | None:
    """The tensors that stand for `weight` in the layout of another library, by name; None in bigq's own."""
    foreign = LAYOUTS[layout]
    return None if foreign is None else _tensors(weight, foreign)


def _tensors(weight: SavedWeight, foreign: _Foreign) -> dict[str, Tensor]:
    return {name: tensor for matrix in separated(weight) for name, tensor in foreign.tensors(matrix).items()}


def _refuse_unsaved(state: Mapping[str, object], *, on_meta: bool) -> None:
    """Raise an UnsupportedError if a state dict holds what safetensors cannot, or no numbers."""
    reasons: dict[str, list[str]] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            reasons.setdefault("objects that are no tensors", []).append(name)
        elif is_sharded(tensor):
            reasons.setdefault("shards of tensors, which have to be gathered first", []).append(name)
        elif tensor.is_meta and not on_meta:
            reasons.setdefault("tensors on meta", []).append(name)
        elif not is_dense(tensor):
            reasons.setdefault("tensors that are not dense", []).append(name)
        elif tensor.dtype not in DTYPE_NAMES:
            reasons.setdefault("tensors whose dtype no safetensors file has", []).append(f"{name} ({tensor.dtype})")
    if reasons:
        listed = "; ".join(f"{what}: {shortlist(names)}" for what, names in reasons.items())
        raise UnsupportedError(f"the model cannot be saved, because it holds {listed}")


def _replaced(
    model: nn.Module, state: Mapping[str, Tensor], weights: Sequence[SavedWeight], foreign: _Foreign
) -> dict[str, Tensor]:
    """`state` with the tensors of `foreign` in the places of quantized weights."""
    replaced: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedModule):
            replaced.add(tensor_name(name, QUANT_STATE))
            for leaf, description in module.descriptions.items():
                replaced.add(tensor_name(name, leaf))  # of a placeholder
                replaced |= {tensor_name(name, state_name(leaf, part)) for part in description.state_spec}
    by_first = {state_name(weight.name, "packed"): weight for weight in weights}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in by_first:
            tensors |= _tensors(by_first[name], foreign)
        elif name not in replaced:
            tensors[name] = tensor
    return tensors
