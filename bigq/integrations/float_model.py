"""open_float_model: the model of a folder or a Hub repository with its float weights, as its own library loads it."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from bigq.checkpoint.hub import Repository, parse_repository
from bigq.checkpoint.model_config import read_config
from bigq.errors import ConfigError, UnsupportedError
from bigq.integrations.skeleton import build_skeleton, config_folder

__all__ = ["open_float_model", "place_of", "refuse_quantized"]

Name = str | os.PathLike[str]


def open_float_model(
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
        ConfigError: the checkpoint is quantized already.
        CheckpointError: there is no such folder or repo.
        UnsupportedError: its library refuses it.
    """
    refuse_quantized(name, trust_remote_code=trust_remote_code)
    kind: Any = type(build_skeleton(name, trust_remote_code=trust_remote_code))
    place, found = place_of(name)
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
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UnsupportedError(f"{kind.__name__}.from_pretrained cannot load {name}: {error}") from error
    loaded: nn.Module = model.eval() if "device_map" in settings else model.to(device).eval()
    return loaded


def refuse_quantized(name: Name, *, trust_remote_code: bool = False) -> None:
    """Raise a ConfigError if a checkpoint is quantized: no float model can be loaded from it."""
    folder = config_folder(name, trust_remote_code=trust_remote_code)
    said = read_config(folder / "config.json").get("quantization_config")
    if said:
        how = said.get("quant_method", "unknown") if isinstance(said, dict) else said
        raise ConfigError(
            f"{name} is quantized already (quant_method {how!r}), and a float model is needed: "
            "pass the one that it was made from"
        )


def place_of(name: Name) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` calls a folder or repo, and its revision and folder as arguments."""
    repository: Repository | None = None
    if not Path(name).is_dir() and isinstance(name, str):
        repository = parse_repository(name)
    if repository is None:
        return str(name), {}
    settings = {"revision": repository.revision, "subfolder": repository.folder}
    return repository.id, {key: value for key, value in settings.items() if value}


def _is_of_transformers(kind: type) -> bool:
    """Whether a class is one of transformers' models."""
    return any(base.__module__.startswith("transformers.") for base in kind.__mro__)
