"""save_quantized: a quantized model as a folder that bigq, or another library, loads."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from bigq.errors import ConfigError, UnsupportedError
from bigq.formats import QUANT_STATE, state_name
from bigq.interop.transformers_model import is_transformers_model
from bigq.model.tree import tensor_name
from bigq.saving import bitsandbytes, compressed_tensors
from bigq.saving.files import write_shards
from bigq.saving.model_config import write_configs
from bigq.saving.saved_weight import SavedWeight, kept_linears, quantized_weights
from bigq.system.text import shortlist
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["save_quantized"]


class _Foreign(NamedTuple):
    """How another library stores weights: the functions of the file of its name."""

    check: Callable[..., None]
    tensors: Callable[[SavedWeight], dict[str, Tensor]]
    quantization_config: Callable[[Sequence[SavedWeight], Sequence[str]], dict[str, object]]


_OWN = "bigq"
_LAYOUTS: dict[str, _Foreign | None] = {
    _OWN: None,
    bitsandbytes.LAYOUT: _Foreign(bitsandbytes.check, bitsandbytes.tensors, bitsandbytes.quantization_config),
    compressed_tensors.LAYOUT: _Foreign(
        compressed_tensors.check, compressed_tensors.tensors, compressed_tensors.quantization_config
    ),
}


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    layout: str = _OWN,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a quantized model as safetensors, with the names and shapes of bigq or of another library.

    Files that an earlier call wrote to `folder` are replaced. A transformers model also gets its config.json and
    generation_config.json; another model only a config.json with the `quantization_config` of a foreign layout. Nothing
    is quantized again, so "bitsandbytes" holds the same codes and scales.

    Args:
        model: one that `load_and_quantize_model` returned, on any device and with any device map.
        folder: is created if it does not exist.
        layout: "bigq", which every model can be saved in; "bitsandbytes", for linears in NF4, FP4 or int8 whose
            in_features is a multiple of the block size; or "compressed-tensors", for linears in int8, whose outlier
            columns it does not have.
        max_shard_size: bytes of a file, or a string such as "5GB".
        metadata: further entries of the metadata of each safetensors file.

    Raises:
        ConfigError: an argument has another value.
        UnsupportedError: the layout cannot hold a weight, which is named; or the model is not quantized, is sharded, or
            holds tensors on meta. Nothing is written then.

    Example:
        >>> import tempfile
        >>> import bigq, safetensors.torch, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 8))
        >>> model = bigq.load_and_quantize_model(model, None, "nf4", device_map="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bigq.save_quantized(model, folder, layout="bitsandbytes")
        ...     sorted(safetensors.torch.load_file(f"{folder}/model.safetensors"))[:3]
        ['0.weight', '0.weight.absmax', '0.weight.quant_map']
    """
    if layout not in _LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; expected one of {list(_LAYOUTS)}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"metadata holds {key!r}: {value!r}; expected strings, as safetensors stores them")
    foreign, weights = _LAYOUTS[layout], quantized_weights(model)
    if not weights:
        raise UnsupportedError(f"{type(model).__name__} holds no quantized weight: save it with its own library")
    state = model.state_dict()
    _refuse_unsaved(state)
    quantization_config = None
    if foreign is not None:
        foreign.check(weights, in_transformers=is_transformers_model(model))
        state = _in_layout(model, state, weights, foreign)
        quantization_config = foreign.quantization_config(weights, kept_linears(model))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    write_shards(state, path, max_shard_size=max_shard_size, metadata=metadata or {}, tied=list(tied))
    write_configs(model, path, quantization_config)


def _refuse_unsaved(state: Mapping[str, object]) -> None:
    """Raise an UnsupportedError if a state dict holds what safetensors cannot, or no numbers."""
    reasons: dict[str, list[str]] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            reasons.setdefault("objects that are no tensors", []).append(name)
        elif hasattr(tensor, "to_local"):
            reasons.setdefault("shards of tensors, which have to be gathered first", []).append(name)
        elif tensor.is_meta:
            reasons.setdefault("tensors on meta", []).append(name)
    if reasons:
        listed = "; ".join(f"{what}: {shortlist(names)}" for what, names in reasons.items())
        raise UnsupportedError(f"the model cannot be saved, because it holds {listed}")


def _in_layout(
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
            tensors |= foreign.tensors(by_first[name])
        elif name not in replaced:
            tensors[name] = tensor
    return tensors
