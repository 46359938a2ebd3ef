"""Runs: bytes that lie together are cut into the tensors that they are."""

from pathlib import Path

import torch

from bigq.checkpoint import LocalFile, Span, StoredTensor
from bigq.runs import Target, make_runs

TENSORS = {
    "a": torch.randn(3, 8),
    "scalar": torch.tensor([1.5, 2.5, 3.5, 4.5]),
    "none": torch.zeros(0, 7),
    "halves": torch.randn(2, 2, 4).half(),
    "bytes": torch.arange(16, dtype=torch.uint8),
    "long": torch.arange(4).view(2, 2),
    "b": torch.randn(5),
    "after": torch.randn(2),
}


def test_a_run_of_several_dtypes():
    file, infos, offset = LocalFile(Path("f"), 1 << 20), [], 64
    for name, tensor in TENSORS.items():
        spans = (Span(file, offset, tensor.nbytes),)
        info = StoredTensor(name=name, shape=tensor.shape, dtype=tensor.dtype, where="f", spans=spans)
        infos.append(info)
        offset += info.nbytes
    target = Target(device=torch.device("cpu"))
    first, second = make_runs(infos, dict.fromkeys(TENSORS, target), 1 << 20)
    assert [part.info.name for part in second.parts] == ["after"], "20 bytes before it: not aligned"
    raw = b"".join(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in TENSORS.values())
    chunks = first.start(50)
    assert [len(chunk.memory) for chunk in chunks] == [50] * (first.nbytes // 50) + [first.nbytes % 50]
    for chunk in chunks:
        assert not first.handed_over.is_set()
        at = first.spans[0].offset - 64 + chunk.start
        assert (chunk.source, chunk.offset - 64) == (file, at)
        chunk.memory.copy_(torch.frombuffer(bytearray(raw[at : at + len(chunk.memory)]), dtype=torch.uint8))
        first.chunk_done()
    assert first.handed_over.is_set()
    pieces = first.pieces()
    assert [piece.info.name for piece in pieces] == list(TENSORS)[:-1]
    for piece in pieces:
        expected = TENSORS[piece.info.name]
        assert torch.equal(piece.tensor, expected), piece.info.name
        assert (piece.tensor.dtype, piece.tensor.shape, piece.is_lent) == (expected.dtype, expected.shape, True)
    assert [first.name_at(at) for at in (0, 95, 96, 111, 112, 143)] == [
        "a",
        "a",
        "scalar",
        "scalar",
        "halves",
        "halves",
    ]
