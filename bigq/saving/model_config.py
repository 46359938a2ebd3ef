"""write_configs: config.json and generation_config.json beside saved weights."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from bigq.checkpoint.model_config import read_config
from bigq.interop.transformers_model import is_transformers_model

__all__ = ["write_configs"]


def write_configs(model: nn.Module, folder: Path, quantization_config: Mapping[str, object] | None) -> None:
    """Write what transformers needs to load its `model` from `folder`, with this `quantization_config`.

    None: that of the model's own config. For a model of another library only the `quantization_config` is written, if
    there is one, into the config.json that there may be.
    """
    if not is_transformers_model(model):
        if quantization_config is not None:
            path = folder / "config.json"
            content = read_config(path) | {"quantization_config": quantization_config}
            path.write_text(json.dumps(content, indent=2) + "\n")
        return
    known: Any = model
    config = deepcopy(known.config)
    config.architectures = [type(model).__name__]
    config.dtype = known.dtype
    if quantization_config is not None:
        config.quantization_config = dict(quantization_config)
    config.save_pretrained(folder)
    if known.can_generate():
        known.generation_config.save_pretrained(folder)
