"""The checkpoint of a Hugging Face Hub repository, downloaded into the Hub's cache."""

import logging
import re
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from bigq.checkpoint.choose import Choice, Listing, choose, list_folder
from bigq.checkpoint.index import read_index
from bigq.errors import CheckpointError
from bigq.system.text import shortlist

__all__ = ["download", "is_repo_id"]

logger = logging.getLogger(__name__)

_REPO_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a repository id, `name` or `owner/name`."""
    return _REPO_ID.fullmatch(text) is not None


def download(repo_id: str, revision: str | None) -> tuple[Path, Choice]:
    """Download the files of a repository's checkpoint, and no others; return their folder and the choice made.

    When the repository cannot be reached, a complete copy in the cache is used.
    """
    try:
        # One request without retries: a mistyped local path is not answered with half a minute of them.
        siblings = HfApi().model_info(repo_id, revision=revision, timeout=10).siblings
    except Exception as error:  # by version, huggingface_hub lets its HTTP client's own exceptions through
        cached = _cached_folder(repo_id, revision)
        if cached is None:
            raise CheckpointError(_explain(repo_id, revision, error)) from error
        logger.warning("%s; using the copy in %s", _explain(repo_id, revision, error), cached)
        return cached, choose(list_folder(cached))

    names = {sibling.rfilename for sibling in siblings or ()}
    choice = choose(
        Listing(
            place=f"the Hub repository {repo_id!r}",
            names=names,
            contains=names.__contains__,
            read_index=lambda name: read_index(_fetch(repo_id, revision, [name]) / name),
        )
    )
    if not choice.proven:
        raise CheckpointError(
            f"the Hub repository {repo_id!r} holds several safetensors files and no index: {shortlist(choice.files)}; "
            "download the one to load and pass its path"
        )
    wanted = [*choice.files] if choice.index is None else [choice.index, *choice.files]
    return _fetch(repo_id, revision, wanted), choice


def _fetch(repo_id: str, revision: str | None, names: list[str]) -> Path:
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=[escape(name) for name in names])
    except Exception as error:  # as above
        raise CheckpointError(_explain(repo_id, revision, error)) from error
    return Path(folder)


def _cached_folder(repo_id: str, revision: str | None) -> Path | None:
    for name in _STANDARD_NAMES:
        cached = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _explain(repo_id: str, revision: str | None, error: Exception) -> str:
    """Say what went wrong on the Hub and what to do about it."""
    page = f"https://huggingface.co/{repo_id}"
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too, so it comes first
        return f"the Hub repository {repo_id!r} is gated: ask for access on {page}, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no file, folder or Hub repository is called {repo_id!r}: check the name; "
            "if the repository is private, run `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub repository {repo_id!r} has no revision {revision!r}: its branches and tags are on {page}"
    return (
        f"no file or folder is called {repo_id!r}, and the Hub repository of that name could not be reached "
        f"({type(error).__name__}: {error}): check the path or the connection, "
        "or download the files and pass their folder"
    )
