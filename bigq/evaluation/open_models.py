"""open_source_model and open_quantized_model: the two models of a comparison, from a folder or a Hub repository."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigq.checkpoint import Checkpoint, Source
from bigq.checkpoint.hub import Repository, parse_repository
from bigq.checkpoint.model_config import read_config
from bigq.config import QuantizationConfig
from bigq.errors import ConfigError, UnsupportedError
from bigq.integrations.skeleton import build_skeleton, config_folder
from bigq.load import load_and_quantize_model
from bigq.model.tree import ModelTree
from bigq.open_source import open_source

__all__ = ["files_nbytes", "open_quantized_model", "open_source_model", "source_tensors", "tokenizer_of"]

Name = str | os.PathLike[str]


def source_tensors(name: Name, *, trust_remote_code: bool = False) -> Source:
    """The tensors of a float checkpoint under the names of its model; reads headers only.

    Raises:
        ConfigError: the checkpoint is quantized already, so it is nothing to compare with.
        CheckpointError: there is no such folder or repo, or its files are damaged.
    """
    _refuse_quantized(name, trust_remote_code)
    tree = ModelTree(build_skeleton(name, trust_remote_code=trust_remote_code))
    source, _ = open_source(tree, name, strict=False)
    return source


def open_source_model(
    name: Name,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a float model as its own library does.

    Args:
        name: a folder, or a Hub repo id with `@revision` or without.
        device: where it goes.
        dtype: of its parameters. None: that of its files.
        device_map: "auto" and its like; overrides `device`.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError, CheckpointError: as of `source_tensors`.
        UnsupportedError: its library refuses it.
    """
    _refuse_quantized(name, trust_remote_code)
    kind: Any = type(build_skeleton(name, trust_remote_code=trust_remote_code))
    place, found = _place(name)
    settings: dict[str, Any] = dict(found)
    if device_map is not None:
        settings["device_map"] = device_map
    if _is_of_transformers(kind):
        settings |= {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
        if device.type == "cuda":
            settings.setdefault("device_map", {"": device})  # tensors go there one by one
    elif dtype is not None:
        settings["torch_dtype"] = dtype  # as diffusers calls it
    try:
        model = kind.from_pretrained(place, **settings)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedError(f"{kind.__name__}.from_pretrained cannot load {name}: {error}") from error
    loaded: nn.Module = model.eval() if "device_map" in settings else model.to(device).eval()
    return loaded


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


def files_nbytes(name: Name) -> int:
    """Bytes of the files of a checkpoint, with headers and padding."""
    return sum(path.stat().st_size for path in Checkpoint.open(name, strict=False).files)


def tokenizer_of(name: Name, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model of transformers.

    Raises:
        UnsupportedError: there is none beside the model.
    """
    import transformers

    place, settings = _place(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **settings)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise UnsupportedError(
            f"a text needs the tokenizer of {name}, which does not load: {error}; save it there, or leave the text out"
        ) from error


def _is_of_transformers(kind: type) -> bool:
    """Whether a class is one of transformers' models."""
    return any(base.__module__.startswith("transformers.") for base in kind.__mro__)


def _refuse_quantized(name: Name, trust_remote_code: bool) -> None:
    folder = config_folder(name, trust_remote_code=trust_remote_code)
    said = read_config(folder / "config.json").get("quantization_config")
    if said:
        how = said.get("quant_method", "unknown") if isinstance(said, dict) else said
        raise ConfigError(
            f"{name} is quantized already (quant_method {how!r}), so it is nothing to compare with: "
            "pass the float model that it was made from"
        )


def _place(name: Name) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` calls a folder or repo, and its revision and folder as arguments."""
    repository: Repository | None = None
    if not Path(name).is_dir() and isinstance(name, str):
        repository = parse_repository(name)
    if repository is None:
        return str(name), {}
    settings = {"revision": repository.revision, "subfolder": repository.folder}
    return repository.id, {key: value for key, value in settings.items() if value}
