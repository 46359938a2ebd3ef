"""Which pickles are state dicts, and how the others are refused."""

import pickle
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from bigq.checkpoint import Checkpoint, pickle_file
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
        pytest.param({3: torch.ones(2)}, "the key 3 is a int, not a name", id="a key that is no name"),
        pytest.param({"a": torch.ones(2), "epoch": 3}, "'epoch' is a int, not a tensor", id="a number"),
        pytest.param({"a": None, "b": "x"}, "'a' is a NoneType, not a tensor, 'b' is a str", id="every problem"),
        pytest.param({"s": torch.eye(3).to_sparse()}, "'s' is sparse or nested (torch.sparse_coo)", id="sparse"),
        pytest.param({"m": torch.ones(3, device="meta")}, "'m' was saved without data", id="meta"),
        pytest.param(
            {"state_dict": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}, "epoch": 3},
            "its tensors are under 'state_dict', 'ema': extract one with torch.save(torch.load(",
            id="nested",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(Sparse invariant|Validating sparse)")  # by torch, when it loads a sparse tensor
def test_what_is_no_flat_state_dict(tmp_path, save, content, message):
    save(content, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", message)


def test_a_warning_that_is_made_an_error_is_no_damage(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: warnings.warn("torch has news", stacklevel=1))
    with pytest.raises(UserWarning, match="torch has news"):
        Checkpoint.open(tmp_path / "weights.pt")


def test_the_way_out_of_a_nested_dict_works(tmp_path, monkeypatch):
    torch.save({"model_state_dict": {"a": torch.ones(2)}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="extract one with") as info:
        Checkpoint.open(tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    exec(str(info.value).partition("extract one with ")[2], {"torch": torch})
    assert Checkpoint.open("state_dict.pt").get("a").tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantized tensors
def test_a_quantized_tensor(tmp_path):
    torch.save({"q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "'q' is quantized by torch (torch.qint8), dequantize it first")


def test_a_pickle_that_could_run_code_is_refused_by_class(tmp_path, save):
    save(nn.Linear(2, 2), tmp_path / "model.bin")
    refused(tmp_path / "model.bin", "torch.nn.modules.linear.Linear", "can run code", "weights_only=False")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran code')",)


def test_code_in_a_pickle_does_not_run(tmp_path, save):
    save({"a": torch.ones(2), "b": Bomb()}, tmp_path / "model.bin")
    refused(tmp_path / "model.bin", "exec")


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
