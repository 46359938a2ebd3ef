"""push_folder: a finished folder as a repository of the Hub."""

import os

from huggingface_hub import HfApi, get_token

from bigq.errors import CheckpointError, UnsupportedError

__all__ = ["push_folder", "refuse_without_token"]


def refuse_without_token() -> None:
    """Raise an UnsupportedError if nobody is logged in to the Hub, before hours of work are done for it."""
    if get_token() is None:
        raise UnsupportedError("nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN")


def push_folder(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False) -> str:
    """Upload all files of `folder` to the Hub repository `repo_id`, and return its address. It is made if it is absent.

    Args:
        folder: as `quantize_checkpoint` wrote it.
        repo_id: such as "owner/name".
        private: whether a repository that is made can only be seen by its owner.

    Raises:
        UnsupportedError: nobody is logged in.
        CheckpointError: the Hub refuses, or cannot be reached. The folder stays as it is.
    """
    refuse_without_token()
    api = HfApi()
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), commit_message="Quantized with bigq")
    except Exception as error:  # by version, huggingface_hub lets its HTTP client's own exceptions through
        raise CheckpointError(
            f"cannot upload to {repo_id!r} ({type(error).__name__}: {error}); {os.fspath(folder)} is complete: check "
            f"the name and the connection, then run `hf upload {repo_id} {os.fspath(folder)}`"
        ) from error
    return address
