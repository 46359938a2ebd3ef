"""with_diffusers_names: an old checkpoint of diffusers under the names that its models have today."""

import sys
from typing import Any

from bigq.checkpoint import Renamed, Source
from bigq.model.tree import ModelTree

__all__ = ["is_diffusers_model", "with_diffusers_names"]


def is_diffusers_model(model: object) -> bool:
    """Whether `model` is one of diffusers, which is not imported for it."""
    kind = getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)
    return kind is not None and isinstance(model, kind)


def with_diffusers_names(tree: ModelTree, source: Source) -> Source:
    """`source` with the names that a model of diffusers has for it; itself for other models, and where all names fit.

    Attention blocks of autoencoders were saved as `query`, `key`, `value` and `proj_attn`. A model renames the keys of
    the dict that it is given, so it gets one from each name to itself.
    """
    if source.in_place or not is_diffusers_model(tree.model):
        return source
    rename = getattr(tree.model, "_fix_state_dict_keys_on_load", None)
    if rename is None:
        return source
    names: dict[str, Any] = {name: name for name in source.tensors}
    rename(names)
    renamed = {old: new for new, old in names.items() if old != new}
    return Renamed(source, renamed) if renamed else source
