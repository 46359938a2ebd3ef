"""StoredTensor and its spans: they fit each other, and their bytes are the tensor."""

import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from bigq.checkpoint import LocalFile, ReadError, Span, StoredTensor, read_tensor
from bigq.errors import CheckpointError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    file = LocalFile(path, 100)
    yield file
    file.close()


def stored(shape, dtype, *spans):
    return StoredTensor(name="x", shape=torch.Size(shape), dtype=dtype, where="f", spans=spans)


def test_nbytes_are_those_of_shape_and_dtype():
    assert stored([3, 5], torch.float16).nbytes == 30
    assert stored([], torch.float64).nbytes == 8
    assert stored([0, 5], torch.int8).nbytes == 0
    assert stored([4], torch.float4_e2m1fn_x2).nbytes == 4


def test_spans_that_do_not_hold_the_tensor_are_refused(file):
    message = r"'x' of f: torch.float16 \[3, 5\] takes 30 bytes, but its spans hold 29"
    with pytest.raises(CheckpointError, match=message):
        stored([3, 5], torch.float16, Span(file, 0, 29))
    with pytest.raises(CheckpointError, match=message):
        stored([3, 5], torch.float16, Span(file, 0, 20), Span(file, 50, 9))


def test_it_cannot_be_changed_and_equality_leaves_out_where_the_bytes_lie(file):
    tensor = stored([2], torch.uint8, Span(file, 0, 2))
    with pytest.raises(FrozenInstanceError):
        tensor.name = "y"
    assert tensor == stored([2], torch.uint8) == stored([2], torch.uint8, Span(file, 7, 2))
    assert tensor != stored([2], torch.int8)


def test_a_tensor_is_the_bytes_of_its_spans_one_after_the_other(file):
    tensor = read_tensor(stored([2, 2], torch.int16, Span(file, 9, 3), Span(file, 50, 0), Span(file, 2, 5)))
    assert bytes(tensor.view(torch.uint8).flatten().tolist()) == bytes([9, 10, 11, 2, 3, 4, 5, 6])
    assert (tensor.dtype, tensor.shape) == (torch.int16, (2, 2))
    assert read_tensor(stored([0, 3], torch.float32, Span(file, 9, 0))).shape == (0, 3)


def test_a_tensor_without_spans_is_not_read_as_one_with_none_of_its_bytes():
    with pytest.raises(CheckpointError, match=r"'x' of f lies in no plain bytes"):
        read_tensor(stored([2], torch.int8))


def test_a_read_that_fails_names_the_tensor(file):
    with pytest.raises(CheckpointError, match=r"file ended at byte 100, in the middle of tensor 'x': it was cut short"):
        read_tensor(stored([8], torch.uint8, Span(file, 0, 4), Span(file, 98, 4)))


def test_a_read_error_survives_pickling_as_those_of_another_process_must():
    for error in (ReadError("file", 7), ReadError("file", 7, "timeout")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.name, again.at, again.reason) == (str(error), "file", 7, error.reason)
