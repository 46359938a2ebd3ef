"""scratch_folder and free: room for what a benchmark makes, given back when it is done."""

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bigq.errors import PlacementError

__all__ = ["free", "require_space", "scratch_folder"]


@contextmanager
def scratch_folder(folder: Path | None) -> Iterator[Path]:
    """A new folder in `folder`, or where temporary files go; it is removed with all that is in it.

    Raises FileNotFoundError if `folder` does not exist.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="bigq-bench-") as made:
        yield Path(made)


def require_space(folder: Path, nbytes: int) -> None:
    """Raise a PlacementError unless the drive of `folder` has room for `nbytes` more."""
    free_nbytes = shutil.disk_usage(folder).free
    if nbytes > free_nbytes:
        raise PlacementError(
            f"a checkpoint of {nbytes / 1e9:.2f} GB does not fit into {folder}, whose drive has "
            f"{free_nbytes / 1e9:.2f} GB left: pass another --folder or a smaller --size"
        )


def free(device: torch.device) -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
