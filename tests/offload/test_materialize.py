"""materialize: everything comes home, exactly, or nothing is touched."""

import gc
import os
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from bigq import (
    CheckpointError,
    PlacementError,
    QuantizationConfig,
    load_and_quantize_model,
    materialize,
    memory_footprint,
)
from bigq.offload.hooks import Float32Hook, PlacementHook
from bigq.offload.space import is_file_backed

GPU = torch.cuda.is_available()
RUNS_ON = 0 if GPU else "cpu"
MAPS = {
    "disk": {"": RUNS_ON, "blocks": "disk"},
    "mixed": {"": RUNS_ON, "embed": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "head": "disk"},
    "a-root-parameter": {"": RUNS_ON, "gain": "disk"},
}


@pytest.fixture(params=MAPS.values(), ids=MAPS.keys())
def device_map(request):
    return request.param


@pytest.fixture
def load(tiny, checkpoint, empty, tmp_path):
    def build(config, device_map):
        options = {"offload": "quantized", "offload_folder": tmp_path}
        return load_and_quantize_model(empty(tiny), checkpoint, config, device_map, **options)

    return build


@pytest.fixture
def model(load):
    return load(QuantizationConfig("nf4"), MAPS["mixed"])


def test_the_model_computes_the_same_without_hooks(load, config, device_map, ids):
    model = load(config, device_map)
    expected = model(ids)
    assert model.is_loaded_in_8bit is False
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert materialize(model) is model
    assert not [module for module in model.modules() if hasattr(module, "_hf_hook") or module._forward_hooks]
    assert {t.device.type for t in model.state_dict().values()} == {"cuda" if GPU else "cpu"}
    assert not any(is_file_backed(t) for t in model.state_dict().values())
    assert not hasattr(model, "hf_device_map")
    assert model.is_loaded_in_8bit is True
    assert torch.equal(model(ids.to(model.gain.device)).cpu(), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), before[name])
    assert set(memory_footprint(model).nbytes) == {"cuda:0" if GPU else "cpu"}
    assert model.double().gain.dtype == torch.float64


def test_ties_stay(tiny, empty, ids, tmp_path):
    torch.save(tiny(tied=True).state_dict(), tmp_path / "model.pt")
    model = load_and_quantize_model(
        empty(tiny, tied=True),
        tmp_path / "model.pt",
        QuantizationConfig("nf4"),
        {"": RUNS_ON, "embed": "disk", "head": "disk"},
        offload_folder=tmp_path,
    )
    expected = model(ids)
    assert materialize(model).head.weight is model.embed.weight
    assert torch.equal(model(ids.to(model.gain.device)).cpu(), expected)


def test_float32_hooks_stay(tiny, checkpoint, empty, ids, tmp_path):
    config = QuantizationConfig("nf4", dtype="bf16", cast_buffers=True, keep_in_fp32_modules=["norm"])
    model = load_and_quantize_model(
        empty(tiny), checkpoint, config, {"": RUNS_ON, "blocks": "disk"}, offload_folder=tmp_path
    )
    model.mask = model.mask.bfloat16()
    expected = model(ids)
    hooks = [m._hf_hook for m in materialize(model).modules() if hasattr(m, "_hf_hook")]
    assert [type(hook) for hook in hooks] == [Float32Hook] * 3
    assert torch.equal(model(ids.to(model.gain.device)).cpu(), expected)


def test_a_resident_model_stays_as_it_is(tiny, checkpoint, empty):
    model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), RUNS_ON)
    own = list(model.parameters())
    materialize(model)
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))


def test_what_does_not_fit_is_refused_before_anything_moves(load, device_map, monkeypatch):
    model = load(QuantizationConfig("nf4"), device_map)

    class Full:
        available = 10

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    own = list(model.parameters())
    with pytest.raises(PlacementError, match=r"materialize needs 0\.000 GB on .*another device_map"):
        materialize(model)
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))
    assert isinstance(model._hf_hook, PlacementHook)


def test_a_model_of_others_is_refused():
    with pytest.raises(PlacementError, match="Linear has no hf_device_map"):
        materialize(nn.Linear(2, 2))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="lists the memory maps of Linux")
def test_the_file_is_freed(model, tmp_path):
    def is_mapped():
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    assert is_mapped()
    materialize(model)
    gc.collect()
    assert not is_mapped()


class TestMoves:
    def test_a_hooked_model_refuses(self, load, device_map, ids):
        model = load(QuantizationConfig("nf4"), device_map)
        expected = model(ids)
        for method in ("to", "cuda", "cpu", "half", "float", "double", "bfloat16"):
            words = rf"TinyModel\.{method}\(\) would undo its device map.*materialize"
            with pytest.raises(PlacementError, match=words):
                getattr(model, method)(*(["cpu"] if method == "to" else []))
        assert torch.equal(model(ids), expected)

    @pytest.mark.parametrize("format_name, places", [("nf4", "disk"), ("int8", "mixed"), ("fp4", "a-root-parameter")])
    def test_its_copies_refuse_too(self, load, ids, format_name, places):
        import copy
        import pickle

        model = load(QuantizationConfig(format_name), MAPS[places])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(PlacementError):
                other.half()
            assert torch.equal(other(ids), model(ids))
            assert torch.equal(materialize(other)(ids.to(other.gain.device)).cpu(), model(ids))


def test_a_checkpoint_that_was_cut_short_is_an_error_and_the_model_stays(tiny, checkpoint, empty, config):
    path = next(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else checkpoint
    model = load_and_quantize_model(empty(tiny), checkpoint, config, {"": RUNS_ON, "embed": "disk"}, offload="preserve")
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="cut short after the model was loaded"):
        materialize(model)
    assert [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")] == hooks
    assert is_file_backed(model.embed.weight)


def test_a_failure_half_way_leaves_the_model_as_it_was(model, ids, monkeypatch):
    expected = model(ids)

    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigq.offload.materialize.dispatch", failing)
    with pytest.raises(KeyboardInterrupt):
        materialize(model)
    assert torch.equal(model(ids), expected)
    monkeypatch.undo()
    assert torch.equal(materialize(model)(ids.to(model.gain.device)).cpu(), expected)


def test_a_failure_half_way_leaves_hooks_that_know_their_modules(model, ids, monkeypatch):
    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigq.offload.materialize.dispatch", failing)
    with pytest.raises(KeyboardInterrupt):
        materialize(model)
    monkeypatch.undo()
    hooked, settled = {module for module in model.modules() if hasattr(module, "_hf_hook")}, set()
    monkeypatch.setattr("bigq.offload.hooks.settle", lambda module, *_: settled.add(module))
    model.blocks[0].register_parameter("added", nn.Parameter(torch.zeros(2)))
    model(ids)
    assert settled == hooked
