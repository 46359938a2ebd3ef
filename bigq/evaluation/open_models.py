"""open_quantized_model: the quantized model of a comparison, and what of both is read beside their weights."""

import os
from typing import Any

import torch
from torch import nn

from bigq.checkpoint import Checkpoint, Source
from bigq.config import QuantizationConfig
from bigq.dry_run.plan import plan
from bigq.errors import ConfigError, UnsupportedError
from bigq.integrations.float_model import place_of, refuse_quantized
from bigq.integrations.skeleton import build_skeleton
from bigq.load import load_and_quantize_model
from bigq.model.tree import ModelTree
from bigq.open_source import open_source

__all__ = ["check_quantized_model", "files_nbytes", "open_quantized_model", "source_tensors", "tokenizer_of"]

Name = str | os.PathLike[str]


def source_tensors(name: Name, *, trust_remote_code: bool = False) -> Source:
    """The tensors of a float checkpoint under the names of its model; reads headers only.

    Raises:
        ConfigError: the checkpoint is quantized already.
        CheckpointError: there is no such folder or repo, or its files are damaged.
    """
    refuse_quantized(name, trust_remote_code=trust_remote_code)
    tree = ModelTree(build_skeleton(name, trust_remote_code=trust_remote_code))
    source, _ = open_source(tree, name, strict=False)
    return source


def open_quantized_model(
    source: Name,
    quantized: Name | None,
    config: QuantizationConfig | None,
    device: torch.device,
    *,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a quantized checkpoint into the model of its source, or quantize the source while it is loaded.

    Args:
        source: the folder or repo whose config.json describes the model.
        quantized: the same model, quantized by bigq or bitsandbytes. None: `source` is quantized.
        config: how, if `quantized` is None.
        device: where it goes.
        device_map: as in `load_and_quantize_model`; overrides `device`.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError, CheckpointError, PlacementError, UnsupportedError: as of `load_and_quantize_model`.
    """
    if (quantized is None) == (config is None):
        raise ConfigError("pass either a quantized checkpoint or a config that says how to quantize the source")
    skeleton = build_skeleton(source, trust_remote_code=trust_remote_code)
    location = source if quantized is None else quantized
    return load_and_quantize_model(skeleton, location, config, device_map or device, progress=False)


def check_quantized_model(
    source: Name,
    quantized: Name | None,
    config: QuantizationConfig | None,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Raise what `open_quantized_model` would raise of files and configs, from headers alone: before minutes of work.

    The arguments are as there; nothing is loaded.
    """
    skeleton = build_skeleton(source, trust_remote_code=trust_remote_code)
    plan(skeleton, config, device, weights_location=source if quantized is None else quantized)


def files_nbytes(name: Name) -> int:
    """Bytes of the files of a checkpoint, with headers and padding."""
    return sum(path.stat().st_size for path in Checkpoint.open(name, strict=False).files)


def tokenizer_of(name: Name, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model of transformers.

    Raises:
        UnsupportedError: there is none beside the model.
    """
    import transformers

    place, settings = place_of(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **settings)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise UnsupportedError(
            f"a text needs the tokenizer of {name}, which does not load: {error}; save it there, or leave the text out"
        ) from error
