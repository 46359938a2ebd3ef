"""A checkpoint that is cut short after the load: whoever asks for the model's state gets an error, and no SIGBUS."""

import copy
import os
import pickle

import pytest
import torch
from accelerate import Accelerator

import bigq.load_source
from bigq import CheckpointError, QuantizationConfig, load_and_quantize_model, materialize
from bigq.system.internals import state_hooks

GPU = torch.cuda.is_available()
RUNS_ON = 0 if GPU else "cpu"
ASKS = {
    "state_dict": lambda model, folder: [tensor.sum() for tensor in model.state_dict().values()],
    "save_model": lambda model, folder: Accelerator().save_model(model, folder / "saved"),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.dumps(model),
}


@pytest.fixture
def load(tiny, checkpoint, empty):
    def build(model=None):
        config, places = QuantizationConfig("nf4"), {"": RUNS_ON, "embed": "disk", "blocks.1": "disk"}
        return load_and_quantize_model(model or empty(tiny), checkpoint, config, places, offload="preserve")

    return build


@pytest.fixture
def path(checkpoint):
    return next(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else checkpoint


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_a_file_that_was_cut_short_is_an_error_that_names_it(load, path, tmp_path, ask):
    model, size = load(), path.stat().st_size
    os.truncate(path, 4096)
    child = os.fork()
    if not child:  # a SIGBUS ends the child only
        try:
            ask(model, tmp_path)
        except CheckpointError as error:
            words = f"{path} had {size} bytes and now has 4096: it was cut short after the model was loaded"
            os._exit(0 if words in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_a_file_that_was_removed_or_replaced_is_still_there(load, path, tmp_path, ids, ask):
    model = load()
    expected = model(ids)
    path.rename(path.with_name("old"))
    path.write_bytes(b"another")
    ask(model, tmp_path)
    assert torch.equal(copy.deepcopy(model)(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)


def test_a_materialized_model_needs_no_file(load, path, ids, tmp_path):
    model = load()
    expected = model(ids)
    materialize(model)
    assert not state_hooks(model)[0]
    os.truncate(path, 4096)
    for ask in ASKS.values():
        ask(model, tmp_path)
    assert torch.equal(model(ids.to(model.gain.device)).cpu(), expected)


def test_so_does_a_copy(load, path, tmp_path):
    model = copy.deepcopy(load())
    os.truncate(path, 4096)
    for ask in ASKS.values():
        ask(model, tmp_path)
    assert len(state_hooks(model)[0]) == 1
    materialize(model)
    assert not state_hooks(model)[0]


def test_a_model_is_guarded_once_however_often_it_is_loaded(load, tiny, empty, monkeypatch):
    model = empty(tiny)
    for _ in range(2):
        load(model)
        assert len(state_hooks(model)[0]) == 1
    hooks = dict(state_hooks(model)[0])

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(bigq.load_source, "count_weights", fail)  # after the hooks are attached
    for other, held in ((model, hooks), (empty(tiny), {})):
        with pytest.raises(KeyboardInterrupt):
            load(other)
        assert state_hooks(other)[0] == held


def test_a_resident_model_has_no_guard(tiny, checkpoint, empty):
    assert not state_hooks(load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), RUNS_ON))[0]
