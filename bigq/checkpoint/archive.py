"""The zip archive that torch.save writes: where its records lie in the file, and where a memory map of it lies."""

import os
import struct
import sys
from bisect import bisect_right
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from bigq.errors import CheckpointError

__all__ = ["ZIP_MAGIC", "MappedFile", "read_records"]

ZIP_MAGIC = b"PK\x03\x04"
_IS_FOLDER = 0x10  # in the attributes of DOS
_LOCAL_HEADER = struct.Struct("<4s22sHH")  # magic, what the directory says too, lengths of the name and of the extra


def read_records(path: Path) -> dict[int, int]:
    """{offset in the file: bytes} of the records of an archive.

    Raises:
        CheckpointError: it holds a program, a record is marked as none, or the bytes of its records are not those of
            the tensors, which a memory map would not notice.
    """
    records: dict[int, int] = {}
    with path.open("rb") as file, ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(
                f"{path} is a TorchScript archive, code with its weights: load it with torch.jit.load "
                "and save its state_dict() with safetensors or torch.save"
            )
        for entry in archive.infolist():
            if entry.compress_type != ZIP_STORED:
                raise CheckpointError(f"{path} is compressed ({entry.filename}): load and save it again with torch")
            if entry.external_attr & _IS_FOLDER and entry.file_size:
                raise CheckpointError(
                    f"{path} is damaged: {entry.filename} is marked as a folder, of which torch reads nothing; "
                    "download or save it again"
                )
            if entry.filename.endswith("/byteorder") and archive.read(entry).decode() != sys.byteorder:
                raise CheckpointError(f"{path} was saved on a machine of another byte order: save it as safetensors")
            records[_data_offset(file, entry)] = entry.file_size
    return records


def _data_offset(file: BinaryIO, entry: ZipInfo) -> int:
    """Where the bytes of a record begin: torch pads the header before them, which the directory does not say."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(ZIP_MAGIC):
        raise BadZipFile(f"no record begins at byte {entry.header_offset}")
    _, _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return entry.header_offset + len(header) + int(name_length) + int(extra_length)


class MappedFile:
    """Where the file at `path` is mapped in the memory of this process; nowhere, where the system has no list of it."""

    def __init__(self, path: Path) -> None:
        # As bytes: a file elsewhere in the process may have a name in no encoding at all.
        name = os.fsencode(os.path.realpath(path)).replace(b"\n", rb"\012")
        maps = []
        for line in _list_maps():
            fields = line.split(maxsplit=5)
            if fields[5:] == [name]:
                start, stop = (int(address, 16) for address in fields[0].split(b"-"))
                maps.append((start, stop, int(fields[2], 16)))
        self._maps = sorted(maps)
        self._starts = [start for start, _, _ in self._maps]

    def offset_of(self, address: int) -> int | None:
        """Which byte of the file lies at `address`; None where none does."""
        position = bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        start, stop, offset = self._maps[position]
        return address - start + offset if address < stop else None


def _list_maps() -> list[bytes]:
    """The memory maps of this process, a line each; none where the system has no list of them."""
    try:
        return Path("/proc/self/maps").read_bytes().split(b"\n")
    except OSError:
        return []
