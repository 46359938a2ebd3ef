"""drop_cached: let the next read of a file come from the drive."""

import os
from pathlib import Path

import psutil

__all__ = ["drop_cached", "file_system"]


def drop_cached(descriptor: int) -> None:
    """Write what of an open file is not on the drive yet, and drop its pages from memory.

    A file system in memory (tmpfs) has no drive, and keeps them.
    """
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def file_system(folder: Path) -> str:
    """The kind of file system that holds `folder`, such as "ext4" or "tmpfs"; "unknown" if the system does not say."""
    path = folder.resolve()
    mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounted[place] for place in (path, *path.parents) if place in mounted), "unknown")
