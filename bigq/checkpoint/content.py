"""What a file is, by its first bytes: a name says little, and a file of the Hub's cache has none."""

from pathlib import Path

from bigq.checkpoint.archive import ZIP_MAGIC
from bigq.checkpoint.choose import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, TRAINING_SUFFIXES, has_suffix
from bigq.errors import CheckpointError

__all__ = ["is_safetensors"]

_PICKLES = [bytes((0x80, protocol)) for protocol in range(2, 6)]
_LONGEST = 300  # bytes, as many as the end of a tar archive's magic needs
_COMPRESSED = "a compressed file: unpack it, and pass what was in it"
_PAGE = "a web page, as a download leaves that failed: download it again"
_FOREIGN = {  # (offset, bytes): what it is, and what to do
    (0, b"GGUF"): "a GGUF file, quantized for llama.cpp: take the original weights of the model, as safetensors",
    (0, b"\x89HDF"): "an HDF5 file of Keras or TensorFlow: take the PyTorch weights of the model",
    (0, b"version https://git-lfs"): "a pointer of Git LFS and not the file: run `git lfs pull` in its folder",
    (0, b"<!DOCTYPE"): _PAGE,
    (0, b"<!doctype"): _PAGE,
    (0, b"<html"): _PAGE,
    (0, b"\x1f\x8b"): _COMPRESSED,
    (0, b"BZh"): _COMPRESSED,
    (0, b"\xfd7zXZ"): _COMPRESSED,
    (0, b"\x28\xb5\x2f\xfd"): _COMPRESSED,
    (257, b"ustar"): "a tar archive: unpack it, and pass what was in it",
}


def is_safetensors(path: Path) -> bool:
    """Whether the file at `path` is to be read as safetensors; else it is to be read as a pickle of torch.save.

    Its name decides only where its content is of no kind, as that of a file that was cut short.

    Raises:
        CheckpointError: it cannot be read, or is of another kind, which the error names.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_LONGEST)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    if head[5:9] == b"\0\0\0{":  # the length of the header, and the header
        return True
    is_safe = has_suffix(path.name, SAFETENSORS_SUFFIX)
    if head.startswith(ZIP_MAGIC) or (head[:2] in _PICKLES and head[2:3] != b"\0"):
        if is_safe:
            raise CheckpointError(
                f"{path} is a pickle and no safetensors file: rename it to end with {PICKLE_SUFFIXES[0]}"
            )
        return False
    for (offset, magic), what in _FOREIGN.items():
        if head.startswith(magic, offset):
            raise CheckpointError(f"{path} is {what}")
    if is_safe:
        return True
    if has_suffix(path.name, *PICKLE_SUFFIXES, *TRAINING_SUFFIXES):
        return False
    raise CheckpointError(
        f"{path} is no checkpoint: expected safetensors or a state dict that torch.save wrote, "
        f"and it begins with {head[:16]!r}"
    )
