"""build_skeleton: the model that a folder or a Hub repository describes, with no numbers, from its config alone."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from bigq.checkpoint.hub import Repository, download_files, parse_repository
from bigq.checkpoint.model_config import read_config
from bigq.errors import CheckpointError, UnsupportedError

__all__ = ["build_skeleton", "config_folder"]

CONFIG = "config.json"
_CODE = "*.py"  # of a repository that brings the code of its model


def build_skeleton(
    name_or_folder: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Build the model that a config.json describes: parameters on the meta device, in eval mode. Reads no weights.

    The class is the one that config.json names: in `architectures` for a model of transformers, in `_class_name` for
    one of diffusers. transformers' AutoModel chooses it where `architectures` names none. Buffers have their numbers,
    because no checkpoint holds those that are not persistent. What config.json says of quantization is left out:
    the parameters are those of the original model.

    Args:
        name_or_folder: a folder with a config.json, or a Hub repo: `owner/name` or `owner/name/folder`, with
            `@revision` or without. Of a repo, config.json is downloaded, and its code if `trust_remote_code` is True.
        revision: branch, tag or commit of the repo; overrides that of `name_or_folder`.
        trust_remote_code: whether code that comes with the model may run, for models that transformers does not know.

    Returns:
        The model. Its parameters have no memory.

    Raises:
        CheckpointError: there is no such folder or repo, or no config.json in it, or config.json names no model.
        UnsupportedError: transformers or diffusers is not installed, or does not know the model.

    Example:
        >>> import json, pathlib, tempfile
        >>> from bigq.integrations.skeleton import build_skeleton
        >>> said = {"architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(said))
        ...     model = build_skeleton(folder)
        >>> type(model).__name__, model.encoder.layer[0].output.dense.weight.device, model.training
        ('BertModel', device(type='meta'), False)
    """
    folder = config_folder(name_or_folder, revision=revision, trust_remote_code=trust_remote_code)
    said = read_config(folder / CONFIG)
    if not said:
        raise CheckpointError(f"{folder / CONFIG} is no JSON object: it is damaged; download or save it again")
    if isinstance(said.get("_class_name"), str):
        model = _of_diffusers(folder, said)
    elif "model_type" in said or "auto_map" in said:
        model = _of_transformers(folder, said, trust_remote_code)
    else:
        raise CheckpointError(
            f"{folder / CONFIG} names no model: expected `model_type`, as transformers writes it, or `_class_name`, as "
            "diffusers does; build the model with its own library, and pass it"
        )
    return model.eval()


def config_folder(
    name_or_folder: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """The folder of a model's config.json. Of a Hub repo it is downloaded, without weights, into the Hub's cache.

    Raises:
        CheckpointError: there is no such folder or repo, or no config.json in it.
    """
    folder = _folder(name_or_folder, revision, trust_remote_code)
    if not (folder / CONFIG).is_file():
        has_parts = (folder / "model_index.json").is_file()
        hint = (
            "; it is a pipeline of diffusers: pass one of its models, such as its folder 'transformer' or 'unet'"
            if has_parts
            else "; build the model with its own library, and pass it"
        )
        raise CheckpointError(f"{name_or_folder} has no {CONFIG}, which says which model it is{hint}")
    return folder


def _folder(name_or_folder: str | os.PathLike[str], revision: str | None, trust_remote_code: bool) -> Path:
    path = Path(name_or_folder)
    if os.path.isdir(path):
        return path
    if os.path.lexists(path):
        raise CheckpointError(f"{path} is a file; expected the folder with its {CONFIG}, or a Hub repository id")
    repository = parse_repository(name_or_folder) if isinstance(name_or_folder, str) else None
    if repository is None:
        raise CheckpointError(f"no such folder: {path}; expected a folder with a {CONFIG}, or a Hub repository id")
    repository = Repository(repository.id, repository.folder, revision or repository.revision)
    # snapshot_download makes a folder for the repository even where it holds none of these files
    return download_files(repository, [CONFIG, "model_index.json", *([_CODE] if trust_remote_code else [])])


def _of_transformers(folder: Path, said: dict[str, object], trust_remote_code: bool) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            f"{folder / CONFIG} describes a model of transformers, which is not installed: pip install transformers"
        ) from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        kind = _class_of(folder, said, trust_remote_code)
        auto: Any = transformers.AutoModel
        with _empty(config):
            model: Any = kind(config) if kind else auto.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, OSError) as error:
        name = said.get("architectures") or said.get("model_type")
        hint = "" if trust_remote_code or "auto_map" not in said else "; trust_remote_code=True runs the code beside it"
        raise UnsupportedError(
            f"transformers {transformers.__version__} cannot build the model of {folder / CONFIG}, {name}: "
            f"{error}{hint}"
        ) from error
    model.tie_weights()  # parameters that were made on meta one by one
    built: nn.Module = model
    return built


def _class_of(folder: Path, said: dict[str, object], trust_remote_code: bool) -> Any:
    """The class that config.json names: one of transformers or, if it may run, one of the code beside it."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = said.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    remote = said.get("auto_map")
    for name in names:
        if trust_remote_code and isinstance(remote, dict):
            for reference in remote.values():
                if isinstance(reference, str) and reference.rpartition(".")[2] == name:
                    return get_class_from_dynamic_module(reference, str(folder))
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
    return None


def _of_diffusers(folder: Path, said: dict[str, object]) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError(
            f"{folder / CONFIG} describes a model of diffusers, which is not installed: pip install diffusers"
        ) from error
    kind: Any = getattr(diffusers, str(said["_class_name"]), None)
    if nn.Module not in getattr(kind, "__mro__", ()):
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no model {said['_class_name']!r}, which {folder / CONFIG} "
            "names: upgrade diffusers"
        )
    with _empty(None):
        model = kind.from_config({k: v for k, v in said.items() if k != "quantization_config"})
    built: nn.Module = model
    return built


@contextmanager
def _empty(config: Any) -> Iterator[None]:
    """Make parameters on meta in here, in the dtype that `config` of transformers names."""
    before = torch.get_default_dtype()
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers on meta that are initialized in vain
            yield
    finally:
        torch.set_default_dtype(before)
