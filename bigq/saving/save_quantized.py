"""save_quantized: a quantized model as a folder that bigq, or another library, loads."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from bigq.errors import ConfigError
from bigq.saving.files import write_shards
from bigq.saving.gathered import gathered
from bigq.saving.layouts import OWN, check_layout, in_layout
from bigq.saving.model_config import write_configs
from bigq.weight.slices import refuse_slices

__all__ = ["save_quantized"]


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    layout: str = OWN,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a quantized model as safetensors, with the names and shapes of bigq or of another library.

    Files that an earlier call wrote to `folder` are replaced. A transformers model also gets its config.json and
    generation_config.json; another model only a config.json with the `quantization_config` of a foreign layout. Nothing
    is quantized again, so "bitsandbytes" holds the same codes and scales.

    Args:
        model: one that `load_and_quantize_model` returned, on any device and with any device map. If it is sharded, as
            by `fully_shard`, every process has to call this: the first one gathers the model in host memory and writes.
        folder: is created if it does not exist.
        layout: "bigq", which every model can be saved in; "bitsandbytes", for linears in NF4, FP4 or int8 whose
            in_features is a multiple of the block size; or "compressed-tensors", for linears in int8, whose outlier
            columns it does not have. The last two hold transformers' experts one by one, as linears.
        max_shard_size: bytes of a file, or a string such as "5GB".
        metadata: further entries of the metadata of each safetensors file.

    Raises:
        ConfigError: an argument has another value.
        UnsupportedError: the layout cannot hold a weight, which is named; or the model is not quantized, or holds
            slices of tensor parallelism, or tensors on meta. Nothing is written then.

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
    check_layout(layout)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"metadata holds {key!r}: {value!r}; expected strings, as safetensors stores them")
    refuse_slices(model)
    with gathered(model) as writes:
        if not writes:
            return
        saved = in_layout(model, layout)
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tied = getattr(model, "all_tied_weights_keys", None) or ()
        write_shards(saved.tensors, path, max_shard_size=max_shard_size, metadata=metadata or {}, tied=list(tied))
        write_configs(model, path, saved.quantization_config)
