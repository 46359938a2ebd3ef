"""Runs: bytes that lie together are cut into the tensors that they are."""

from pathlib import Path

import torch

from bigq.checkpoint import Checkpoint, LocalFile, Span, StoredTensor, with_scaled
from bigq.loading.runs import Target, make_runs
from scaled_checkpoints import write

CPU = torch.device("cpu")
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
    target = Target(device=CPU)
    first, second = make_runs(infos, dict.fromkeys(TENSORS, target), 1 << 20)
    assert [part.info.name for part in second.parts] == ["after"], "20 bytes before it: not aligned"
    raw = b"".join(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in TENSORS.values())
    chunks = first.start(50)
    assert [len(chunk.memory) for chunk in chunks] == [50] * (first.nbytes // 50) + [first.nbytes % 50]
    for chunk in chunks:
        assert not first.handed_over.is_open
        at = first.spans[0].offset - 64 + chunk.start
        assert chunk.spans == (Span(file, at + 64, len(chunk.memory)),)
        chunk.memory.copy_(torch.frombuffer(bytearray(raw[at : at + len(chunk.memory)]), dtype=torch.uint8))
        first.chunk_done()
    assert first.handed_over.is_open
    pieces = first.pieces()
    assert [piece.info.name for piece in pieces] == list(TENSORS)[:-1]
    for piece in pieces:
        expected = TENSORS[piece.info.name]
        assert torch.equal(piece.tensor, expected), piece.info.name
        assert (piece.tensor.dtype, piece.tensor.shape, piece.is_temporary) == (expected.dtype, expected.shape, True)
    assert [first.name_at(at) for at in (0, 95, 96, 111, 112, 143)] == [
        "a",
        "a",
        "scalar",
        "scalar",
        "halves",
        "halves",
    ]


def stored(name, shape, *spans):
    return StoredTensor(name=name, shape=torch.Size(shape), dtype=torch.uint8, where="f", spans=spans)


def read(run, contents, chunk_nbytes=50):
    """Fill a run from {source: bytes}, chunk by chunk; returns its pieces."""
    for chunk in run.start(chunk_nbytes):
        assert len(chunk.memory) <= chunk_nbytes
        content = b"".join(contents[source][offset : offset + nbytes] for source, offset, nbytes in chunk.spans)
        chunk.memory.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        run.chunk_done()
    assert run.handed_over.is_open
    return run.pieces()


def test_a_tensor_of_several_spans_is_a_run_of_its_own_and_a_chunk_goes_over_their_ends():
    file, other = LocalFile(Path("f"), 1000), LocalFile(Path("g"), 1000)
    contents = {file: bytes(i % 251 for i in range(1000)), other: bytes(i % 241 for i in range(1000))}
    spread = stored("spread", [8, 16], Span(file, 16, 70), Span(other, 5, 0), Span(other, 5, 58))
    tensors = [stored("before", [16], Span(file, 0, 16)), spread, stored("after", [2], Span(other, 63, 2))]
    runs = list(make_runs(tensors, dict.fromkeys(["before", "spread", "after"], Target(device=CPU)), 1 << 20))
    assert [[part.info.name for part in run.parts] for run in runs] == [["before"], ["spread"], ["after"]]
    assert [(chunk.start, len(chunk.memory), chunk.spans) for chunk in runs[1].start(50)] == [
        (0, 50, (Span(file, 16, 50),)),
        (50, 50, (Span(file, 66, 20), Span(other, 5, 30))),
        (100, 28, (Span(other, 35, 28),)),
    ]
    (piece,) = read(runs[1], contents)
    assert bytes(piece.tensor.flatten().tolist()) == contents[file][16:86] + contents[other][5:63]
    assert piece.tensor.shape == (8, 16)


def test_a_row_may_lie_in_two_spans_where_a_tensor_is_split():
    file = LocalFile(Path("f"), 1000)
    contents = {file: bytes(i % 251 for i in range(1000))}
    whole = stored("x", [9, 20], Span(file, 500, 33), Span(file, 100, 10), Span(file, 700, 137))
    expected = contents[file][500:533] + contents[file][100:110] + contents[file][700:837]
    for limit, rows in ((20, [1] * 9), (45, [2, 2, 2, 2, 1]), (7, [1] * 9), (179, [8, 1]), (180, [9])):
        pieces = [
            piece for run in make_runs([whole], {"x": Target(device=CPU)}, limit) for piece in read(run, contents)
        ]
        assert [len(piece.tensor) for piece in pieces] == rows
        assert [piece.start for piece in pieces] == [sum(rows[:i]) for i in range(len(rows))]
        assert bytes(torch.cat([piece.tensor for piece in pieces]).flatten().tolist()) == expected


def test_neighbours_of_two_sources_are_two_runs():
    """Also where offsets and names say that they adjoin."""
    sources = [LocalFile(Path("f"), 1000) for _ in range(2)]
    for second, count in ((sources[0], 1), (sources[1], 2)):
        tensors = [stored("a", [16], Span(sources[0], 0, 16)), stored("b", [16], Span(second, 16, 16))]
        assert len(list(make_runs(tensors, dict.fromkeys("ab", Target(device=CPU)), 1 << 20))) == count


def test_pieces_hold_whole_groups_of_rows():
    file = LocalFile(Path("f"), 4096)
    tensor = stored("a", (10, 16), Span(file, 0, 160))
    target = Target(device=torch.device("cpu"), row_group=4)
    runs = list(make_runs([tensor], {"a": target}, limit=96))  # six rows, so one group of four
    assert [(part.start, part.shape) for run in runs for part in run.parts] == [
        (0, (4, 16)),
        (4, (4, 16)),
        (8, (2, 16)),
    ]


def test_a_run_of_codes_holds_as_many_numbers_as_one_of_floats(tmp_path):
    """Its numbers are in memory too: of codes in 4 bits they are four times as many bytes in bfloat16."""
    packed, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 4)  # which lie elsewhere in the file
    tensors = {f"{i:02d}.w": packed for i in range(40)} | {f"{i:02d}.w_scale_inv": scales for i in range(40)}
    source = with_scaled(Checkpoint.open(write(tmp_path, tensors, {"quant_method": "fp8"})), tmp_path)
    limit, target = 1 << 14, Target(device=CPU)
    runs = list(make_runs(source.tensors.values(), dict.fromkeys(source.tensors, target), limit))
    assert sum(len(run.parts) for run in runs) == 40
    for run in runs:
        codes = sum(part.nbytes for part in run.parts)
        assert codes * 4 <= limit
        assert run.temporary_nbytes + run.decoded_nbytes <= 2 * limit
