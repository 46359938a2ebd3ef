"""Which pickles are state dicts, and how the others are refused."""

import argparse
import mmap
import os
import pickle
import sys
import traceback
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from bigq.checkpoint import Checkpoint, archive, pickle_file, read_tensor
from bigq.errors import CheckpointError


def refused(path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as info:
        Checkpoint.open(path)
    for part in (str(path), *parts):
        assert part in str(info.value)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request):
    return lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=request.param)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_state_dict(tmp_path, save, suffix):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = tmp_path / f"weights{suffix}"
    save(model.state_dict(), path)
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.tensors) == list(model.state_dict())
    for name, tensor in checkpoint.read(checkpoint.tensors):
        assert torch.equal(tensor, model.state_dict()[name])
        assert tensor.dtype == checkpoint.tensors[name].dtype


def test_parameters_come_back_as_plain_tensors(tmp_path, save):
    save(OrderedDict(nn.Linear(2, 3).named_parameters()), tmp_path / "weights.pt")
    checkpoint = Checkpoint.open(tmp_path)
    for _, tensor in checkpoint.read(checkpoint.tensors):
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad


def test_views_are_read_through_their_strides(tmp_path, save):
    base = torch.arange(12.0).view(3, 4)
    save({"t": base.t(), "row": base[1], "same": base}, tmp_path / "weights.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["t"].nbytes == 48
    tensors = dict(checkpoint.read(["t", "row", "same"]))
    assert torch.equal(tensors["t"], base.t())
    assert torch.equal(tensors["row"], base[1])
    assert torch.equal(tensors["same"], base)


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(torch.ones(2), "holds a Tensor, expected a dict", id="a tensor"),
        pytest.param([torch.ones(2)], "holds a list, expected a dict", id="a list"),
        pytest.param({3: torch.ones(2)}, "a key is a int, not a name", id="a key that is no name"),
        pytest.param({"a": torch.ones(2), "epoch": 3}, "'epoch' is a int, not a tensor", id="a number"),
        pytest.param({"a": None, "b": "x"}, "'a' is a NoneType, not a tensor, 'b' is a str", id="every problem"),
        pytest.param({"m": torch.ones(3, device="meta")}, "'m' was saved without data", id="meta"),
        pytest.param(
            {"state_dict": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}, "epoch": 3},
            "its tensors are under 'state_dict', 'ema': extract one with torch.save(torch.load(",
            id="nested",
        ),
    ],
)
def test_what_is_no_flat_state_dict(tmp_path, save, content, message):
    save(content, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", message)


def test_a_warning_that_is_made_an_error_is_no_damage(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: warnings.warn("torch has news", stacklevel=1))
    with pytest.raises(UserWarning, match="torch has news"):
        Checkpoint.open(tmp_path / "weights.pt")


def test_the_way_out_of_a_nested_dict_works(tmp_path, monkeypatch):
    torch.save({"x": {"model": {"a": torch.ones(2)}}, "ema": {"a": torch.ones(2)}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="extract one with") as info:
        Checkpoint.open(tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    exec(str(info.value).partition("extract one with ")[2], {"torch": torch})
    assert Checkpoint.open("state_dict.pt").get("a").tolist() == [1, 1]


def test_the_message_about_a_key_is_short_whatever_the_key(tmp_path, save):
    """A tuple that holds itself twice, and so on, takes few bytes in a pickle and a million in a text."""
    key: tuple = ()
    for _ in range(16):
        key = (key, key)
    save({key: torch.ones(2), "a" * 3000: 3}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="a key is a tuple, not a name") as info:
        Checkpoint.open(tmp_path)
    assert len(str(info.value)) < 2000


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantized tensors
def test_a_quantized_tensor(tmp_path):
    torch.save({"q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "'q' is quantized by torch (torch.qint8), dequantize it first")


def test_a_pickle_that_could_run_code_is_refused_by_class(tmp_path, save):
    save(nn.Linear(2, 2), tmp_path / "model.bin")
    refused(tmp_path / "model.bin", "torch.nn.modules.linear.Linear", "can run code", "state_dict() alone")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran code')",)


def test_code_in_a_pickle_does_not_run(tmp_path, save):
    save({"a": torch.ones(2), "b": Bomb()}, tmp_path / "model.bin")
    refused(tmp_path / "model.bin", "exec")


class Shell:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    "content",
    [Bomb(), Shell(), nn.Linear(2, 2), argparse.Namespace(lr=0.1), {1, 2}, range(3), OrderedDict(a=object)],
    ids=lambda content: type(content).__name__,
)
def test_nobody_is_told_to_let_a_pickle_run(tmp_path, save, content):
    save({"a": torch.ones(2), "b": content}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError) as info:
        Checkpoint.open(tmp_path)
    shown = "".join(traceback.format_exception(info.value))
    for advice in ("weights_only=False", "`weights_only`", "add_safe_globals", "weights_only` set to"):
        assert advice not in shown


@pytest.mark.parametrize(
    "content", [pickle.dumps({"a": 1}, protocol=4), pickle.dumps([1.5], protocol=2), b"\x80\x02x."]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nor_where_torch_cannot_read_it(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError) as info:
        Checkpoint.open(tmp_path)
    assert "weights_only" not in "".join(traceback.format_exception(info.value)).replace("weights_only=True", "")


def test_a_torch_that_unpickles_unsafely(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.bin")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cpu"))
    refused(tmp_path / "model.bin", "torch 2.9.1+cpu", "2.10", "safetensors")


@pytest.mark.parametrize("keep", [0, 3, 4, 30, 0.5, -4])
def test_a_truncated_pickle(tmp_path, save, keep):
    path = tmp_path / "model.bin"
    save({"a": torch.ones(64)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refused(path, "damaged, truncated or not written by torch.save")


@pytest.mark.parametrize(
    "content", [b"hello", b"\0" * 64, b"PK\x03\x04" + b"\0" * 64, pickle.dumps({"a": 1}, protocol=2)], ids=repr
)
def test_what_torch_did_not_save(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    refused(tmp_path / "model.bin", "model.bin")


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "model.bin", "cannot load")


def test_a_zip_is_mapped_and_not_read(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.bin")
    mapped = []
    load = torch.load
    monkeypatch.setattr(pickle_file.torch, "load", lambda *a, **k: mapped.append(k["mmap"]) or load(*a, **k))
    assert Checkpoint.open(tmp_path).get("a").tolist() == [1, 1]
    assert mapped == [True, True]


def test_an_archive_that_a_map_would_read_wrongly(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "saved.bin")
    other = b"big" if sys.byteorder == "little" else b"little"
    for how, compression, words in (
        ("compressed", zipfile.ZIP_DEFLATED, "is compressed"),
        ("swapped", zipfile.ZIP_STORED, "saved on a machine of another byte order"),
    ):
        path = tmp_path / f"{how}.bin"
        with zipfile.ZipFile(tmp_path / "saved.bin") as saved, zipfile.ZipFile(path, "w", compression) as archive:
            for entry in saved.namelist():
                is_order = how == "swapped" and entry.endswith("/byteorder")
                archive.writestr(entry, other if is_order else saved.read(entry))
        refused(path, words)


@pytest.mark.parametrize("layout", ["coo", "coo, unsorted", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls CSR a beta, and 2.11 warns when it loads a sparse tensor
def test_a_sparse_tensor_is_read_as_a_dense_one(tmp_path, save, layout):
    dense = torch.tensor([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    sparse = {
        "coo": dense.to_sparse(),
        "coo, unsorted": torch.sparse_coo_tensor([[1, 0, 1], [0, 1, 0]], [3.0, 2.0, 2.0], (2, 3)),
        "csr": dense.to_sparse_csr(),
    }[layout]
    save({"s": sparse, "a": torch.ones(2)}, tmp_path / "weights.pt")
    checkpoint = Checkpoint.open(tmp_path)
    stored = checkpoint.tensors["s"]
    assert (stored.shape, stored.dtype, stored.nbytes, stored.spans) == ((2, 3), torch.float32, 24, ())
    assert torch.equal(checkpoint.get("s"), dense)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_tensor_in_sparse_blocks_is_refused(tmp_path, save):
    save({"s": torch.eye(4).to_sparse_bsr(2)}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "'s' is sparse or nested (torch.sparse_bsr), call to_dense() first")


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_with_indices_outside_is_refused(tmp_path, save):
    bad = torch.sparse_coo_tensor(torch.tensor([[0, 9]]), torch.ones(2), (10,))
    bad._indices()[0, 1] = 11
    save({"s": bad}, tmp_path / "weights.pt")
    # torch 2.15 looks at the indices when it opens the file
    with pytest.raises(CheckpointError, match=r"(cannot read tensor 's' of|cannot load) .*weights\.pt"):
        Checkpoint.open(tmp_path).get("s")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "is a TorchScript archive", "torch.jit.load", "state_dict()")


COMPLEX = torch.complex(torch.arange(4.0), torch.arange(4.0) + 1)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch._neg_view(torch.arange(4.0)), id="neg"),
        pytest.param(COMPLEX.conj(), id="conj"),
        pytest.param(torch._neg_view(COMPLEX).conj(), id="neg and conj"),
        pytest.param(COMPLEX.clone().conj().imag, id="imag of conj"),
    ],
)
def test_a_bit_that_changes_the_numbers_is_no_bytes_of_the_file(tmp_path, save, tensor):
    save({"x": tensor, "plain": COMPLEX}, tmp_path / "m.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.tensors["x"].spans
    ((_, read),) = checkpoint.read(["x"])
    assert (read.is_neg(), read.is_conj()) == (False, False)  # whoever takes its bytes gets its numbers
    assert read.tolist() == tensor.resolve_neg().tolist()


def test_the_spans_of_a_mapped_tensor_are_its_bytes(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"row": base[1], "base": base, "flags": torch.tensor([True, False]), "empty": torch.empty(0)}
    torch.save(tensors, tmp_path / "m.bin")
    checkpoint = Checkpoint.open(tmp_path)
    for name in ("row", "base", "flags"):
        assert torch.equal(read_tensor(checkpoint.tensors[name]), tensors[name])


def rewrite(path, change):
    """Write the archive at `path` again, each record as `change(name, data)` has it."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize(
    "data, nbytes", [(b"", 0), (b"1234", 4), (bytes(15), 15), (bytes(17), 17)], ids=["empty", "short", "cut", "long"]
)
def test_a_record_of_another_size_than_its_tensor_is_refused(tmp_path, data, nbytes):
    torch.save({"a": torch.ones(4), "b": torch.ones(9)}, tmp_path / "m.bin")
    rewrite(tmp_path / "m.bin", lambda name, held: data if name.endswith("/data/0") else held)
    refused(tmp_path / "m.bin", f"'a' takes 16 bytes, and its record has {nbytes}", "download or save it again")


@pytest.mark.parametrize("maps", [True, False], ids=["mapped", "where no maps are listed"])
def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path, monkeypatch, maps):
    if not maps:
        monkeypatch.setattr(archive, "_list_maps", lambda: [])
    path = tmp_path / "m.bin"
    torch.save({"w": torch.randn(4)}, path)
    content = bytearray(path.read_bytes())
    attributes = content.rindex(b"m/data/0") - 8  # in the directory, before the name
    assert content[attributes : attributes + 4] == bytes(4)
    content[attributes] = 0x10  # torch then reads nothing, and returns memory that nobody wrote
    path.write_bytes(content)
    refused(path, "is damaged", "data/0 is marked as a folder")


def test_records_in_another_order_are_read_where_they_are(tmp_path):
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "m.bin")
    with zipfile.ZipFile(tmp_path / "m.bin") as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as new:
        for name in reversed([name for name in records if "format_version" not in name]):
            new.writestr(name, records[name])
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["b", "a"]
    assert read_tensor(checkpoint.tensors["a"]).tolist() == checkpoint.get("a").tolist() == [1, 1, 1, 1]


def test_records_are_looked_for_in_their_own_headers(tmp_path):
    """The directory of a zip does not say how long the padding before a record is."""
    torch.save({"a": torch.ones(4)}, tmp_path / "m.bin")
    content = (tmp_path / "m.bin").read_bytes()
    at = content.index(torch.ones(4).numpy().tobytes())
    assert archive.read_records(tmp_path / "m.bin")[at] == 16


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="lists the memory maps of Linux")
@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb c\t", "größe 权重".encode()], ids=repr)
def test_files_of_any_name_may_be_mapped_in_the_process(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb+") as file:
        file.write(b"0" * 4096)
        file.flush()
        with mmap.mmap(file.fileno(), 4096):
            torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
            assert read_tensor(Checkpoint.open(tmp_path / "m.bin").tensors["a"]).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["größe 权重.bin", "a\nb.bin", " x .bin"])
def test_a_mapped_pickle_of_any_name_has_spans(tmp_path, name):
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    assert read_tensor(Checkpoint.open(tmp_path / name).tensors["a"]).tolist() == [1, 1]


def test_where_no_maps_are_listed_the_file_is_read_and_its_records_compared_too(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_list_maps", list)
    torch.save({"a": torch.ones(4)}, tmp_path / "m.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.tensors["a"].spans
    assert checkpoint.get("a").tolist() == [1, 1, 1, 1]
    rewrite(tmp_path / "m.bin", lambda name, data: b"1234" if name.endswith("/data/0") else data)
    refused(tmp_path / "m.bin", "record size")
