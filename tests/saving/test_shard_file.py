"""ShardFile: files written piece by piece are those that safetensors reads."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bigq.formats import TensorSpec
from bigq.saving.shard_file import ShardFile, data_nbytes


def spec(tensor):
    return TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype)


def tensors():
    return {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "rows": torch.randn(5, 3).bfloat16(),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.int8),
        "complex": torch.randn(3, dtype=torch.complex64),
        "flags": torch.tensor([True, False, True]),
        "float8": torch.randn(3, 3).to(torch.float8_e4m3fn),
        'a "name" of ünicode': torch.randn(2, 2, 3),
    }


def write(path, held, late=()):
    with ShardFile(
        path, {name: spec(tensor) for name, tensor in held.items()}, late=late, metadata={"of": "me"}
    ) as file:
        for name, tensor in held.items():
            file.write(name, tensor)
        return file.finish()


def test_every_dtype_comes_back_with_its_bits(tmp_path):
    held, path = tensors(), tmp_path / "a.safetensors"
    nbytes = write(path, held)
    found = load_file(path)
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.dim() else found[name] == tensor
    assert nbytes == data_nbytes(path) == sum(tensor.nbytes for tensor in held.values())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "me"}


def test_rows_come_in_any_order(tmp_path):
    weight, path = torch.randn(10, 4), tmp_path / "a.safetensors"
    with ShardFile(path, {"w": spec(weight)}, late=(), metadata={}) as file:
        for start in (6, 0, 3):
            file.write("w", weight[start : start + (4 if start == 6 else 3)], start=start)
        file.finish()
    assert load_file(path)["w"].equal(weight)


def test_what_is_late_may_be_longer_or_shorter(tmp_path):
    for length in (0, 1, 20, 84):
        held = {"text": torch.zeros(length, dtype=torch.uint8), "w": torch.randn(3), "more": torch.ones(3).byte()}
        specs = {name: spec(tensor) for name, tensor in held.items()} | {
            "text": TensorSpec(shape=(20,), dtype=torch.uint8)
        }
        with ShardFile(tmp_path / "a.safetensors", specs, late={"text"}, metadata={}) as file:
            for name, tensor in held.items():
                file.write(name, tensor)
            file.finish()
        found = load_file(tmp_path / "a.safetensors")
        assert all(found[name].equal(tensor) for name, tensor in held.items()), length


def test_a_hole_is_a_bug_that_shows(tmp_path):
    held = tensors()
    specs = {name: spec(tensor) for name, tensor in held.items()}
    with ShardFile(tmp_path / "a.safetensors", specs, late={"bytes"}, metadata={}) as file:
        file.write("rows", held["rows"][:3])
        with pytest.raises(AssertionError, match=r"not or twice written: \['number', .*'rows'.*'bytes'\]"):
            file.finish()
        with pytest.raises(AssertionError, match="rows: expected"):
            file.write("rows", held["rows"].float())


def test_a_full_disk_is_an_error_with_the_path(tmp_path, monkeypatch):
    import os

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write(tmp_path / "a.safetensors", tensors())
    assert raised.value.filename == str(tmp_path / "a.safetensors")
