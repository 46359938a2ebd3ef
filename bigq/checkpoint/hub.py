"""The checkpoint of a Hugging Face Hub repository, downloaded into the Hub's cache."""

import logging
import re
from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path
from typing import IO, NamedTuple

from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from bigq.checkpoint.choose import Choice, Listing, choose, holds_weights, list_folder
from bigq.checkpoint.index import read_index
from bigq.errors import CheckpointError
from bigq.system.text import shortlist

__all__ = ["Remote", "Repository", "download", "download_files", "open_file", "parse_repository", "survey"]

logger = logging.getLogger(__name__)

_PART = r"\w[\w.-]*"
_REPOSITORY = re.compile(rf"(?P<id>({_PART}/)?{_PART})(/(?P<folder>{_PART}(/{_PART})*))?(@(?P<revision>.+))?", re.ASCII)
_CONFIGS = ("config.json", "adapter_config.json")  # say of weights how they were quantized, or what they belong to


class Repository(NamedTuple):
    """A folder of a Hub repository; `folder` is "" for the repository itself, `revision` None for its main branch."""

    id: str
    folder: str
    revision: str | None

    def __str__(self) -> str:
        return (
            f"the Hub repository {self.id!r}" if not self.folder else f"{self.folder!r} of the repository {self.id!r}"
        )


def parse_repository(text: str) -> Repository | None:
    """What `text` names: `name`, `owner/name` or `owner/name/folder`, with `@revision` or without; else None."""
    match = _REPOSITORY.fullmatch(text)
    return Repository(match["id"], match["folder"] or "", match["revision"]) if match else None


class Remote(NamedTuple):
    """What `survey` found: the folder of what describes a checkpoint, and the choice of its files.

    `is_here` says that the files are in the folder too, because the repository could not be reached.
    """

    folder: Path
    choice: Choice
    is_here: bool


def download(repository: Repository) -> tuple[Path, Choice]:
    """Download the files of a checkpoint and what describes it, and no others; return their folder and the choice made.

    When the repository cannot be reached, a complete copy in the cache is used.
    """
    found = _choose(repository)
    if isinstance(found, Remote):
        return found.folder, found.choice
    choice, described = found
    return _fetch(repository, [*described, *choice.files]), choice


def survey(repository: Repository) -> Remote:
    """Find the files of a checkpoint as `download` does, and download only what describes it: configs and the index."""
    found = _choose(repository)
    if isinstance(found, Remote):
        return found
    choice, described = found
    return Remote(_fetch(repository, described or [*_CONFIGS]), choice, is_here=False)


def open_file(repository: Repository, name: str) -> IO[bytes]:
    """Open a file of a folder on the Hub: each `read` is one request for a range of its bytes."""
    path = "/".join(filter(None, (repository.id, repository.folder, name)))
    try:
        file: IO[bytes] = HfFileSystem().open(path, "rb", revision=repository.revision, cache_type="none")
    except Exception as error:  # as below
        raise CheckpointError(_explain(repository, error)) from error
    return file


def _choose(repository: Repository) -> Remote | tuple[Choice, list[str]]:
    """The choice of files and the names of what describes them; a Remote where only the cache answers."""
    try:
        # One request without retries: a mistyped local path is not answered with half a minute of them.
        siblings = HfApi().model_info(repository.id, revision=repository.revision, timeout=10).siblings
    except Exception as error:  # by version, huggingface_hub lets its HTTP client's own exceptions through
        return Remote(*_cached(repository, _explain(repository, error), error), is_here=True)

    files = [sibling.rfilename for sibling in siblings or ()]
    prefix = repository.folder and repository.folder + "/"
    names = {file.removeprefix(prefix) for file in files if file.startswith(prefix)}
    if not names and prefix:
        raise CheckpointError(f"the Hub repository {repository.id!r} has no folder {repository.folder!r}{_hint(files)}")
    listing = Listing(
        place=str(repository),
        names=names,
        contains=names.__contains__,
        read_index=lambda name: read_index(_fetch(repository, [name]) / name),
    )
    try:
        choice = choose(listing)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_hint(files)}") from error
    if not choice.proven:
        raise CheckpointError(
            f"{repository} holds several safetensors files and no index: {shortlist(choice.files)}; "
            "download the one to load and pass its path"
        )
    index = [] if choice.index is None else [choice.index]
    return choice, [*index, *filter(names.__contains__, _CONFIGS)]


def _hint(files: Iterable[str]) -> str:
    """Which folders of a repository may be meant."""
    folders = sorted({file.rpartition("/")[0] for file in files if "/" in file and holds_weights(file)})
    return f"; there are weights in its folders {shortlist(folders)}: pass 'owner/name/folder'" if folders else ""


def _cached(repository: Repository, reason: str, cause: Exception) -> tuple[Path, Choice]:
    """The checkpoint as the cache holds it, where the Hub did not answer for this `reason`."""
    try:
        snapshot = snapshot_download(repository.id, revision=repository.revision, local_files_only=True)
    except Exception:  # it is not there; as above
        raise CheckpointError(reason) from cause
    folder = Path(snapshot, repository.folder)
    if not folder.is_dir():
        raise CheckpointError(reason) from cause
    try:
        choice = choose(list_folder(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{reason}; the copy in the cache is not whole: {error}") from cause
    logger.warning("%s; using the copy in %s", reason, folder)
    return folder, choice


def download_files(repository: Repository, patterns: Sequence[str]) -> Path:
    """Download the files of a folder whose names match `patterns`, such as "*.json"; where the folder then is.

    When the repository cannot be reached, what the cache holds of it is used.

    Raises:
        CheckpointError: it cannot be reached and the cache holds nothing of it, or it has no such folder.
    """
    prefix = escape(f"{repository.folder}/") if repository.folder else ""
    try:
        snapshot = snapshot_download(
            repository.id, revision=repository.revision, allow_patterns=[prefix + pattern for pattern in patterns]
        )
    except Exception as error:  # as above
        raise CheckpointError(_explain(repository, error)) from error
    folder = Path(snapshot, repository.folder)
    if not folder.is_dir():
        raise CheckpointError(f"{repository} holds no {' or '.join(patterns)}")
    return folder


def _fetch(repository: Repository, names: list[str]) -> Path:
    """Download these files of a folder; where it then is."""
    patterns = [escape(f"{repository.folder}/{name}" if repository.folder else name) for name in names]
    try:
        snapshot = snapshot_download(repository.id, revision=repository.revision, allow_patterns=patterns)
    except Exception as error:  # as above
        raise CheckpointError(_explain(repository, error)) from error
    return Path(snapshot, repository.folder)


def _explain(repository: Repository, error: Exception) -> str:
    """Say what went wrong on the Hub and what to do about it."""
    repo_id, revision = repository.id, repository.revision
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
