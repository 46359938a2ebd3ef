"""RowWindows: rows of a source's tensors have the bytes of these rows, and no other byte is read."""

import pytest
import torch
from safetensors.torch import save_file

from bigq.checkpoint import Checkpoint, Conversion, Converted, Rows, RowWindows, read_tensor
from bigq.errors import CheckpointError

TENSORS = {"a": torch.arange(35.0).view(7, 5), "b": torch.arange(6).view(3, 2), "c": torch.arange(4.0)}


@pytest.fixture
def source(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


def test_rows_are_cut_out_of_the_bytes(source):
    found = RowWindows(source, {"a": Rows(start=2, stop=5), "c": Rows(start=3, stop=4)})
    assert [(name, tuple(stored.shape)) for name, stored in found.tensors.items()] == [
        (name, {"a": (3, 5), "b": (3, 2), "c": (1,)}[name]) for name in source.tensors
    ]
    assert found.tensors["a"].nbytes == sum(span.nbytes for span in found.tensors["a"].spans) == 60
    assert torch.equal(read_tensor(found.tensors["a"]), TENSORS["a"][2:5])
    assert torch.equal(read_tensor(found.tensors["c"]), TENSORS["c"][3:])
    assert found.tensors["b"] is source.tensors["b"]


def test_a_source_that_reads_tensors_gives_their_rows(source):
    found = RowWindows(source, {"a": Rows(start=5, stop=7), "b": Rows(start=3, stop=3)})
    tensors = dict(found.read(["a", "b", "c"]))
    assert torch.equal(tensors["a"], TENSORS["a"][5:])
    assert tensors["b"].shape == (0, 2)
    assert tensors["b"].dtype == torch.int64
    assert torch.equal(tensors["c"], TENSORS["c"])


def test_rows_of_a_stack_are_those_of_its_members(tmp_path):
    members = {f"{e}.w": torch.full((2, 3), float(e)) for e in range(4)}
    save_file(members, tmp_path / "model.safetensors")
    stack = Conversion(tuple(members), ("w",), lambda tensors: [torch.stack(tensors)], moves_rows=True)
    found = RowWindows(Converted(Checkpoint.open(tmp_path), [stack]), {"w": Rows(start=1, stop=3)})
    assert torch.equal(read_tensor(found.tensors["w"]), torch.stack([members["1.w"], members["2.w"]]))


def test_rows_that_a_tensor_does_not_have_are_refused(source):
    with pytest.raises(CheckpointError, match=r"tensor 'a' of .* has 7 rows; expected rows 6 to 8 of it"):
        RowWindows(source, {"a": Rows(start=6, stop=8)})
    with pytest.raises(CheckpointError, match="d"):
        RowWindows(source, {"d": Rows(start=0, stop=1)})
