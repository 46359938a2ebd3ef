"""Damaged checkpoints: whatever is changed in a valid one, it loads as what it then says, or is refused by bigq."""

import json
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigq import BigqError, QuantizationConfig, QuantizedLinear, load_and_quantize_model

CONFIG = QuantizationConfig("nf4")


def build():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False), nn.Linear(4, 3))


def weights():
    torch.manual_seed(0)
    return build().state_dict()


def changes(size):
    """Up to three changes of `size` bytes: a flipped one, a cut, an insertion, another digit or bracket."""
    positions = st.integers(0, size - 1)
    change = st.one_of(
        st.tuples(st.just("flip"), positions, st.integers(1, 255)),
        st.tuples(st.just("cut"), positions, st.just(0)),
        st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("set"), positions, st.sampled_from(b'0123456789,[]"{}:')),
    )
    return st.lists(change, min_size=1, max_size=3)


def changed(content, changes):
    data = bytearray(content)
    for kind, position, value in changes:
        if kind == "cut":
            del data[position:]
        elif kind == "insert":
            data[position:position] = value
        elif position < len(data):
            data[position] = data[position] ^ value if kind == "flip" else value
    return bytes(data)


def loads_or_is_refused(path, expected):
    """`expected` gives the tensors that the files hold, by the reader of another library."""
    with init_empty_weights():
        model = build()
    before = [type(module) for module in model.modules()]
    try:
        load_and_quantize_model(model, path, CONFIG, "cpu", progress=False)
    except BigqError:
        assert [type(module) for module in model.modules()] == before
        assert all(parameter.is_meta for parameter in model.parameters())
        return
    stored = expected()
    for name, tensor in model.state_dict().items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantizedLinear) and not name.endswith("bias"):
            leaf = name.rpartition(".")[2]
            wanted = layer.quantize(stored[name.replace(leaf, "weight")])[leaf]
        else:
            wanted = stored[name]
        assert torch.equal(tensor.view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


SAFETENSORS = safetensors.torch.save(weights())


@settings(max_examples=80, deadline=None)
@given(changes=changes(len(SAFETENSORS)))
def test_safetensors(changes):
    content = changed(SAFETENSORS, changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        loads_or_is_refused(path, lambda: safetensors.torch.load(content))


HEADER = SAFETENSORS[8 : 8 + int.from_bytes(SAFETENSORS[:8], "little")]


@settings(max_examples=80, deadline=None)
@given(changes=changes(len(HEADER)))
def test_the_header_of_safetensors(changes):
    """Nearly every change of a whole file falls into its data or breaks its length: here the length follows."""
    header = changed(HEADER, changes)
    content = len(header).to_bytes(8, "little") + header + SAFETENSORS[8 + len(HEADER) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        loads_or_is_refused(path, lambda: safetensors.torch.load(content))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_an_index(data):
    files = {"a.safetensors": {}, "b.safetensors": {}}
    for position, (name, tensor) in enumerate(weights().items()):
        files["ab"[position % 2] + ".safetensors"][name] = tensor
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    content = json.dumps(index).encode()
    content = changed(content, data.draw(changes(len(content))))
    with tempfile.TemporaryDirectory() as folder:
        for file, held in files.items():
            safetensors.torch.save_file(held, Path(folder, file))
        path = Path(folder, "model.safetensors.index.json")
        path.write_bytes(content)
        loads_or_is_refused(path, weights)
        loads_or_is_refused(folder, weights)


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def pickle(request):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.bin")
        torch.save(weights(), path, _use_new_zipfile_serialization=request.param)
        return path.read_bytes(), request.param


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch's, of a pickle that names one
def test_a_pickle(pickle, data):
    content, is_zip = pickle
    content = changed(content, data.draw(changes(len(content))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.bin")
        path.write_bytes(content)
        # As a load does, whatever device a tensor was saved from: the tag of one may be what a change has broken.
        loads_or_is_refused(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip))
