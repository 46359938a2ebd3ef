"""What a checkpoint says of its tensors, what it reads, in which order, and which damage it refuses."""

import gc
import json
import os
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from bigq.checkpoint import Checkpoint, StoredTensor, reader
from bigq.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header whatever."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


def refused(location: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as info:
        Checkpoint.open(location)
    for part in parts:
        assert part in str(info.value)
    assert len(str(info.value)) < 5000


def write_index(folder: Path, weight_map: dict[str, str]) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


# Reading


def test_descriptions_and_values(tmp_path):
    weight, bias = torch.randn(3, 4), torch.randn(3, dtype=torch.float16)
    path = tmp_path / "model.safetensors"
    save_file({"weight": weight, "bias": bias}, path)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.files == (path,)
    assert dict(checkpoint.tensors) == {
        "weight": StoredTensor(name="weight", shape=torch.Size([3, 4]), dtype=torch.float32, where=str(path)),
        "bias": StoredTensor(name="bias", shape=torch.Size([3]), dtype=torch.float16, where=str(path)),
    }
    assert [info.nbytes for info in checkpoint.tensors.values()] == [48, 6]
    assert checkpoint.nbytes == 54
    tensors = dict(checkpoint.read(["bias", "weight"]))
    assert torch.equal(tensors["weight"], weight)
    assert torch.equal(tensors["bias"], bias)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_and_shape(tmp_path, dtype, suffix):
    for shape in ((), (0,), (2, 0, 3), (4, 6)):
        if dtype is torch.float4_e2m1fn_x2 and shape == () and suffix == ".safetensors":
            continue  # the format counts 4-bit values, and has no scalar of two
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        stored = torch.arange(nbytes, dtype=torch.uint8)
        stored = (stored % 2 if dtype == torch.bool else stored).view(dtype).reshape(shape)
        path = tmp_path / f"model{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)({"x": stored}, path)
        checkpoint = Checkpoint.open(path)
        found = checkpoint.tensors["x"]
        assert found == StoredTensor(name="x", shape=torch.Size(shape), dtype=dtype, where=str(path))
        assert found.nbytes == checkpoint.nbytes == nbytes, shape
        (name, tensor), *rest = checkpoint.read(["x"])
        assert (name, rest) == ("x", [])
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        assert as_bytes(tensor) == as_bytes(stored), shape


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_file_order(tmp_path, suffix):
    """By shard, then by offset: safetensors sorts by dtype size and name, torch.save keeps the order of the dict."""
    first = {"z": torch.zeros(2, dtype=torch.float16), "y": torch.zeros(2), "x": torch.zeros(2)}
    second = {"b": torch.ones(2), "a": torch.ones(2)}
    shards = [f"model-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for shard, tensors in zip(shards, (first, second), strict=True):
        (save_file if suffix == ".safetensors" else torch.save)(tensors, tmp_path / shard)
    expected = {".safetensors": ["x", "y", "z", "a", "b"], ".bin": ["z", "y", "x", "b", "a"]}[suffix]
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == expected
    assert [name for name, _ in checkpoint.read({"a", "b", "x", "y", "z"})] == expected
    assert [name for name, _ in checkpoint.read(["b", "z", "b", "y"])] == [n for n in expected if n in "bzy"]
    assert [Path(info.where).name for info in checkpoint.tensors.values()] == [shards[0]] * 3 + [shards[1]] * 2


def test_the_order_of_pickled_tensors_is_that_of_their_bytes(tmp_path):
    """Views of one storage lie where the storage does, whatever the dict says."""
    storage = torch.arange(6.0)
    torch.save({"late": storage[4:], "early": storage[:2], "middle": storage[2:4].t()}, tmp_path / "m.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["early", "middle", "late"]
    assert {name: tensor.tolist() for name, tensor in checkpoint.read(checkpoint.tensors)} == {
        "early": [0, 1],
        "middle": [2, 3],
        "late": [4, 5],
    }


def test_read_nothing(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path).read([])) == []


def test_unknown_names_are_refused_before_anything_is_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="does not hold 'b', 'c'"):
        checkpoint.read(["c", "a", "b"])
    with pytest.raises(CheckpointError, match="does not hold 'b'"):
        checkpoint.get("b")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_get_owns_its_memory(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.arange(4.0), "b": torch.ones(9)}, path)
    tensor = Checkpoint.open(path).get("a")
    path.write_bytes(b"")  # a view of the map would now be fatal
    assert tensor.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    ((_, tensor),) = Checkpoint.open(path).read(["a"])
    tensor.fill_(1)
    assert path.read_bytes() == before


def test_foreign_metadata_is_ignored(tmp_path):
    for framework in ("tf", "flax", "mlx", "np"):
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": framework})
        assert Checkpoint.open(tmp_path).get("a").tolist() == [1, 1]


def test_tensor_names_are_arbitrary(tmp_path):
    names = ["", " ", "größe.权重", "a/b", "..", "_metadata", "x" * 300]
    save_file({name: torch.full((2,), float(i)) for i, name in enumerate(names)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: tensor[0].item() for name, tensor in checkpoint.read(names)} == {n: i for i, n in enumerate(names)}


def test_a_checkpoint_keeps_no_file_open_and_opens_each_once_a_pass(tmp_path, monkeypatch):
    for i in (1, 2):
        save_file({f"{i}.{j}": torch.ones(2) for j in range(5)}, tmp_path / f"m-0000{i}-of-00002.safetensors")
    opened, closed = [], []

    class Spy(reader.SafetensorsFile):
        def __init__(self, path):
            assert opened == closed  # the one before is closed
            opened.append(path)
            super().__init__(path)

        def __exit__(self, *error):
            closed.append(self._path)
            super().__exit__(*error)

    monkeypatch.setattr(reader, "SafetensorsFile", Spy)
    checkpoint = Checkpoint.open(tmp_path)
    assert opened == closed == list(checkpoint.files)
    del opened[:], closed[:]
    assert len(list(checkpoint.read(checkpoint.tensors))) == 10
    assert opened == closed == list(checkpoint.files)
    del opened[:], closed[:]
    iterator = checkpoint.read(checkpoint.tensors)
    next(iterator)
    del iterator  # given up half way
    gc.collect()
    assert opened == closed == [checkpoint.files[0]]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="lists the memory maps of Linux")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_finished_file_is_unmapped(tmp_path, suffix):
    shards = [tmp_path / f"m-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for i, shard in enumerate(shards):
        (save_file if suffix == ".safetensors" else torch.save)({f"{i}": torch.ones(5000)}, shard)

    def mapped():
        maps = Path("/proc/self/maps").read_text()
        return [str(shard) in maps for shard in shards]

    checkpoint = Checkpoint.open(tmp_path)
    assert mapped() == [False, False]
    seen = []
    for _, tensor in checkpoint.read(checkpoint.tensors):
        seen.append(mapped())
        del tensor
    assert seen == [[True, False], [False, True]]
    assert mapped() == [False, False]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_threads_read_disjoint_names_of_one_checkpoint(tmp_path, suffix):
    stored = {f"{i}": torch.full((50,), float(i)) for i in range(64)}
    (save_file if suffix == ".safetensors" else torch.save)(stored, tmp_path / f"model{suffix}")
    checkpoint = Checkpoint.open(tmp_path)
    parts = [list(stored)[start::8] for start in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for tensors in pool.map(lambda names: list(checkpoint.read(names)), parts):
            assert len(tensors) == 8
            assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors)


# Shards that disagree


def test_several_disjoint_files_are_one_checkpoint(tmp_path):
    save_file({"text": torch.ones(2)}, tmp_path / "text.safetensors")
    save_file({"vision": torch.zeros(2)}, tmp_path / "vision.safetensors")
    assert list(Checkpoint.open(tmp_path).tensors) == ["text", "vision"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_tensor_in_two_shards_names_both(tmp_path, suffix):
    shards = [tmp_path / f"m-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for shard in shards:
        (save_file if suffix == ".safetensors" else torch.save)({"twice": torch.ones(2)}, shard)
    refused(tmp_path, f"1 tensor(s) are both in {shards[0]} and in {shards[1]}: twice", "an index")


def test_the_index_says_which_of_two_is_meant(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["b", "a", "c"]
    assert checkpoint.get("a").tolist() == [1, 1]


def test_a_tensor_that_the_index_does_not_name_is_kept(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "1.safetensors")
    write_index(tmp_path, {"a": "1.safetensors"})
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]


def test_an_index_that_names_what_its_shard_does_not_hold(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    index = write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "gone": "2.safetensors"})
    refused(
        tmp_path,
        f"the index {index} names 1 tensor(s) that {tmp_path / '1.safetensors'} does not hold: b",
        f"the index {index} names 1 tensor(s) that {tmp_path / '2.safetensors'} does not hold: gone",
    )


def test_one_error_lists_all_problems(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    (tmp_path / "2.safetensors").write_bytes(b"short")
    torch.save([1, 2], tmp_path / "3.bin")
    write_index(tmp_path, {"gone": "1.safetensors", "b": "2.safetensors", "c": "3.bin"})
    refused(tmp_path, str(tmp_path), "hold: gone", "2.safetensors: it has 5 bytes", "3.bin holds a list")


# Damage

GOOD = save({"weight": torch.arange(12.0).view(3, 4), "bias": torch.arange(3, dtype=torch.bfloat16)})
DAMAGED = {
    "empty": (b"", "it has 0 bytes, too few for its header"),
    "shorter than the header length": (GOOD[:5], "it has 5 bytes, too few"),
    "truncated in the header": (GOOD[:40], "it has 40 bytes, too few for its header"),
    "truncated in the data": (GOOD[:-1], f"describes {len(GOOD)} bytes, but it has {len(GOOD) - 1}"),
    "trailing bytes": (GOOD + b"\0", f"describes {len(GOOD)} bytes, but it has {len(GOOD) + 1}"),
    "header too large": (struct.pack("<Q", 100_000_001) + bytes(100), "too few for its header"),
    "header length overflows": (b"\xff" * 16, "too few for its header"),
    "not JSON": (raw(b"{nonsense}"), "invalid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "UTF-8"),
    "deeply nested": (raw(b'{"a":' * 10_000), "header"),
    "not an object": (raw([]), "header"),
    "entry without offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}), "header"),
    "metadata that is no text": (raw({"__metadata__": {"a": 1}}), "header"),
    "overlap": (raw({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)), "offset for tensor `b`"),
    "hole": (raw({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, bytes(6)), "offset for tensor `b`"),
    "a name twice": (
        raw(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
            b"1234",
        ),
        "names a twice",
    ),
    "a name twice, written with an escape": (
        raw(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
            b'"a":{"dtype":"I8","shape":[4],"data\\u005foffsets":[0,4]}}',
            b"1234",
        ),
        "names a twice",
    ),
    "a name of 5000 characters": (raw({"a" * 5000: entry("U8", [4], 0, 4)}, bytes(4)), "has a name of 5000 characters"),
    "a hole after a name of a million": (
        raw({"b": entry("U8", [2], 0, 2), "a" * 1_000_000: entry("U8", [2], 4, 6)}, bytes(6)),
        "offset for tensor",
    ),
    "offsets backwards": (raw({"a": entry("U8", [4], 4, 0)}, bytes(4)), "bytes, but it has"),
    "offsets beyond the file": (raw({"a": entry("U8", [99], 0, 99)}, bytes(4)), "bytes, but it has"),
    "shape does not fill the bytes": (raw({"a": entry("F32", [3], 0, 8)}, bytes(8)), "header"),
    "shape overflows": (raw({"a": entry("U8", [2**63, 4], 0, 4)}, bytes(4)), "overflow"),
    "negative shape": (raw({"a": entry("U8", [-4], 0, 4)}, bytes(4)), "header"),
    "empty tensor beyond 64 bits": (raw({"a": entry("U8", [2**63, 0], 0, 0)}), "tensor 'a' has a shape beyond 64 bits"),
    "unknown dtype": (raw({"a": entry("Q9", [4], 0, 4)}, bytes(4)), "dtypes that torch does not have: 'a' (Q9)"),
    "dtype without torch": (raw({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3)), "'a' (F6_E2M3)"),
    "odd number of 4-bit values": (
        raw({"a": entry("F4", [2, 3], 0, 3)}, bytes(3)),
        "tensor 'a' packs two 4-bit values",
    ),
}


@pytest.mark.parametrize("content, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "some model.safetensors"
    path.write_bytes(content)
    refused(path, str(path), message)


def test_names_given_twice_among_many_are_found_in_no_time(tmp_path):
    names = [f"t{i}" for i in range(20_000)]
    entries = ",".join(f'"{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for name in [*names, *names])
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(f"{{{entries}}}".encode()))
    began = time.perf_counter()
    refused(path, "names t0, t1,", "and 19990 more twice")
    assert time.perf_counter() - began < 3  # 21 s where each name was counted


def test_a_header_beyond_the_limit_of_the_library(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: nothing is written
    refused(path, str(path), "header too large")


def test_an_unreadable_file(tmp_path, monkeypatch):
    for name, target in (("a.safetensors", "bigq.checkpoint.safetensors_file.safe_open"), ("a.bin", "torch.load")):
        save_file({"a": torch.ones(1)}, tmp_path / name)

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(target, refuse)
        refused(tmp_path / name, str(tmp_path / name), "Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_without_permission(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.touch()
    path.chmod(0)
    refused(path, str(path), "ermission denied")


# Changes between opening and reading


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("change", ["truncate", "extend", "delete"])
def test_a_file_that_changes_is_an_error_and_no_bus_error(tmp_path, suffix, change):
    path = tmp_path / f"model{suffix}"
    tensors = {name: torch.ones(100_000) for name in "abc"}
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    checkpoint = Checkpoint.open(path)
    iterator = checkpoint.read(tensors)
    next(iterator)
    match change:
        case "truncate":
            os.truncate(path, 4096)
        case "extend":
            os.truncate(path, path.stat().st_size + 8)
        case "delete":
            path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        next(iterator)  # the file is open
    with pytest.raises(CheckpointError, match=path.name):
        next(checkpoint.read(tensors))  # the file is not


def test_a_file_of_the_same_size_with_other_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(6)}, path)
    checkpoint = Checkpoint.open(path)
    save_file({"a": torch.ones(3, 2), "c": torch.ones(6)}, path)
    for name in ("a", "b"):
        with pytest.raises(CheckpointError, match=r"model.safetensors changed after it was opened: .* another file"):
            checkpoint.get(name)


def test_a_file_of_the_same_size_and_time_with_other_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(6)}, path)
    checkpoint, other = Checkpoint.open(path), tmp_path / "other"
    save_file({"a": torch.ones(3, 2), "c": torch.ones(6)}, other)
    was = path.stat()
    path.write_bytes(other.read_bytes())  # the same inode
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(
        CheckpointError, match=r"model.safetensors changed .*'a' was torch.float32 \(2, 3\) .* \(3, 2\)"
    ):
        checkpoint.get("a")
    with pytest.raises(CheckpointError, match=r"'b' of .*model.safetensors"):
        checkpoint.get("b")


# Any mutation of a good file either reads as the library reads it, or is a CheckpointError

POSITIONS = st.integers(0, len(GOOD) - 1)
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), POSITIONS, st.integers(1, 255)),
        st.tuples(st.just("truncate"), POSITIONS),
        st.tuples(st.just("insert"), POSITIONS, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("digit"), POSITIONS, st.sampled_from(b'0123456789,[]"{}:')),
    ),
    min_size=1,
    max_size=3,
)


def mutated(content: bytes, mutations: list[tuple]) -> bytes:
    data = bytearray(content)
    for kind, position, *value in mutations:
        if kind == "truncate":
            del data[position:]
        elif kind == "insert":
            data[position:position] = value[0]
        elif position < len(data):
            data[position] = data[position] ^ value[0] if kind == "flip" else value[0]
    return bytes(data)


@settings(max_examples=60, deadline=None)
@given(mutations=MUTATIONS)
def test_a_mutated_file_is_read_right_or_refused(mutations):
    content = mutated(GOOD, mutations)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        try:
            checkpoint = Checkpoint.open(path)
            tensors = {name: tensor.clone() for name, tensor in checkpoint.read(checkpoint.tensors)}
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right
            return
    expected = safetensors.torch.load(content)
    assert tensors.keys() == checkpoint.tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (tensor.shape, tensor.dtype) == (info.shape, info.dtype) == (expected[name].shape, expected[name].dtype)
        assert as_bytes(tensor) == as_bytes(expected[name])
