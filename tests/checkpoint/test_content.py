"""A file is what its first bytes say, whatever it is called."""

import gzip
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigq.checkpoint import Checkpoint
from bigq.errors import CheckpointError


def save_safetensors(path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, path)


def save_zip(path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, path)


def save_legacy(path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_safetensors, save_zip, save_legacy], ids=lambda save: save.__name__[5:])
@pytest.mark.parametrize("name", ["last.ckpt", "model.Bin", "best.pth.tar", "0123456789abcdef", "x.bin"])
def test_a_checkpoint_of_any_name(tmp_path, save, name):
    save(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / name)
    assert Checkpoint.open(tmp_path / name).get("a").tolist() == [0, 1, 2]


def test_safetensors_in_capitals(tmp_path):
    save_safetensors(tmp_path / "M.SAFETENSORS")
    for location in (tmp_path, tmp_path / "M.SAFETENSORS"):
        assert Checkpoint.open(location).get("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize("save", [save_zip, save_legacy], ids=lambda save: save.__name__[5:])
@pytest.mark.parametrize("name", ["x.safetensors", "X.SafeTensors"])
def test_a_pickle_does_not_pass_for_safetensors(tmp_path, save, name):
    save(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / name)  # torch.save would write safetensors by that name
    with pytest.raises(CheckpointError, match=r"is a pickle and no safetensors file: rename it to end with \.bin"):
        Checkpoint.open(tmp_path / name)


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(b"weights"))


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.bin")


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model.safetensors", "blob"])
@pytest.mark.parametrize(
    "content, words",
    [
        (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file.*original weights"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "is a web page.*download it again"),
        (gzipped, "is a compressed file: unpack it"),
        (tarred, "is a tar archive: unpack it"),
    ],
    ids=["gguf", "hdf5", "git lfs", "html", "gzip", "tar"],
)
def test_another_kind_is_named(tmp_path, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content(tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(64)], ids=repr)
def test_a_file_of_no_kind_is_shown_as_it_begins(tmp_path, content):
    (tmp_path / "blob").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no checkpoint: expected safetensors or a state dict") as info:
        Checkpoint.open(tmp_path / "blob")
    assert str(info.value).endswith(f"it begins with {content[:16]!r}")
