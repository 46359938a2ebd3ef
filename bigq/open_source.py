"""open_source: a checkpoint under the names of a model's tensors."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bigq.checkpoint import Checkpoint, Completed, Renamed, Source, with_bitsandbytes, with_scaled
from bigq.config import QuantizationConfig
from bigq.formats import Int8, state_name
from bigq.interop.diffusers_names import with_diffusers_names
from bigq.interop.transformers_names import with_transformers_names
from bigq.loading.extra_state import ExtraStates
from bigq.model.in_place import ModelTensors
from bigq.model.own_names import with_own_names
from bigq.model.tree import ModelTree, is_dense
from bigq.planning.make_plan import quant_states
from bigq.weight.convert import is_transposed_linear
from bigq.weight.placeholder import is_placeholder

__all__ = ["open_source", "with_own_tensors"]


def open_source(
    tree: ModelTree,
    weights_location: str | os.PathLike[str] | Sequence[Path] | Checkpoint,
    *,
    strict: bool,
    conversions: Sequence[object] | None = None,
    config: QuantizationConfig | None = None,
) -> tuple[Source, ExtraStates]:
    """Open a checkpoint for the model of `tree`: its tensors as the model names them, and its extra states.

    Args:
        weights_location: as in `load_and_quantize_model`, or the files, or the checkpoint itself.
        strict: also refuse what is neither a tensor nor an extra state that the model takes.
        conversions: transformers' renamings and converters; None: those of the model's class.
        config: what the load was given; its threshold is that of int8 weights whose file does not say it.
    """
    if isinstance(weights_location, Checkpoint):
        checkpoint = weights_location
    elif isinstance(weights_location, Sequence) and not isinstance(weights_location, str):
        checkpoint = Checkpoint.open_files(weights_location, strict=strict)
    else:
        checkpoint = Checkpoint.open(weights_location, strict=strict)
    extra_states = ExtraStates(checkpoint, tree.modules, strict=strict)
    folder = checkpoint.files[0].parent
    source = with_bitsandbytes(
        with_scaled(_without_placeholders(tree, extra_states), folder, partial(_names_held, tree)),
        folder,
        is_transposed=partial(_is_transposed, tree),
        threshold=None if config is None else _threshold(config),
    )
    source = with_diffusers_names(tree, with_transformers_names(tree, source, conversions))
    return with_own_names(tree, source), extra_states


def with_own_tensors(tree: ModelTree, source: Source) -> Source:
    """`source`, completed with the model's own weights of two or more dimensions where it lacks one.

    Other tensors that are missing stay in the model as they are; a weight may have to be quantized.
    """
    missing = [
        group.names[0]
        for group in tree.tensors
        if is_dense(group.tensor)
        and group.tensor.ndim > 1
        and not group.is_buffer
        and not group.tensor.is_meta
        and not any(name in source.tensors or state_name(name, "packed") in source.tensors for name in group.names)
    ]
    return Completed(source, ModelTensors(tree.model), missing) if missing else source


def _without_placeholders(tree: ModelTree, source: Source) -> Source:
    """`source` without the placeholders that a transformers model has in its state."""
    if not quant_states(source.tensors):
        return source
    empty = [name for name, stored in source.tensors.items() if is_placeholder(stored)]
    if not empty:
        return source
    own = {name for group in tree.tensors if is_placeholder(group.tensor) for name in group.names}
    return Renamed(source, {name: None for name in empty if name not in own})


def _is_transposed(tree: ModelTree, name: str) -> bool:
    """Whether the model holds the weight `name` of a checkpoint as [K, N], under that name or one that is converted.

    transformers adds the prefix of the base model to names, or drops it.
    """
    owner, prefix = name.rpartition(".")[0], f"{getattr(tree.model, 'base_model_prefix', '')}."
    names = (owner, prefix + owner, owner.removeprefix(prefix))
    return any(is_transposed_linear(tree.modules[found]) for found in names if found in tree.modules)


def _names_held(tree: ModelTree) -> set[str]:
    """The names of the model's tensors; a checkpoint may have them with the prefix of the base model, or without."""
    prefix = f"{getattr(tree.model, 'base_model_prefix', '')}."
    names = {name for group in tree.tensors for name in group.names}
    return names | {prefix + name for name in names} | {name.removeprefix(prefix) for name in names}


def _threshold(config: QuantizationConfig) -> float | None:
    return next((own.threshold for own in config.formats() if isinstance(own, Int8)), None)
