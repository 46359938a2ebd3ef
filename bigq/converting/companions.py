"""Companions: the files beside the weights of a model that its quantized copy needs as well, such as a tokenizer."""

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import ModelCard

from bigq.checkpoint.choose import INDEX_SUFFIX, holds_weights
from bigq.checkpoint.hub import Repository, download_files, parse_repository

__all__ = ["card_data", "copy_companions", "find_companions", "repository_of"]

# Tokenizers, chat templates, processors, the code of a model, and the terms under which all of it may be used.
PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.spm",
    "*.bpe",
    "*.tiktoken",
    "*.vocab",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
_CARD_DATA = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Written anew, or of other files; the last one says how modelopt has quantized the weights that were decoded.
_OWN = ("config.json", "README.md", "adapter_config.json", "*.index.*.json", "hf_quant_config.json")


def repository_of(source: str | os.PathLike[str]) -> Repository | None:
    """The Hub repository that `source` names; None if it is a path that exists, or names none."""
    if not isinstance(source, str) or os.path.lexists(source):
        return None
    return parse_repository(source)


def find_companions(source: str | os.PathLike[str]) -> Path | None:
    """The folder of the files beside the weights of `source`, downloaded if it is a Hub repository; None for a file."""
    repository = repository_of(source)
    if repository is not None:
        return download_files(repository, PATTERNS)
    return Path(source) if os.path.isdir(source) else None


def copy_companions(folder: Path, destination: Path) -> list[str]:
    """Copy the companions of the weights in `folder`, those in its subfolders too. Returns their names, sorted.

    config.json and the model card are not among them: they are written anew. Subfolders with weights are other models.
    """
    names = sorted(path.as_posix() for path in _found(folder))
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, destination / name)
    return names


def card_data(folder: Path | None) -> dict[str, object]:
    """What the model card in `folder` says that holds for the quantized model too, such as the license."""
    path = None if folder is None else folder / "README.md"
    if path is None or not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):  # it is text for people
        return {}
    return {name: data[name] for name in _CARD_DATA if name in data}


def _found(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        is_top = inside == Path()
        if not is_top and any(map(holds_weights, files)):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in files:
            is_own = is_top and any(fnmatch(name, pattern) for pattern in _OWN)
            if not is_own and not name.endswith(INDEX_SUFFIX) and any(fnmatch(name, own) for own in PATTERNS):
                yield inside / name
