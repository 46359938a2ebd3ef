"""A load that fails after the last tensor has arrived, in whichever step, leaves the model as it was."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

import bigq.load_source
import bigq.loading.jobs
import bigq.offload.dispatch
from bigq import QuantizationConfig, load_and_quantize_model
from bigq.model.transaction import Snapshot

HALF = QuantizationConfig("nf4", dtype="bf16", cast_buffers=True, keep_in_fp32_modules=["norm"])  # float32 hooks too
MAP = {"": "cpu", "blocks.0": "disk", "blocks.2": "disk"}
STEPS = {  # name: (where it is looked up, its name there, the call that fails)
    "commit of the first weight": (bigq.loading.jobs, "commit_weight", 1),
    "commit of the last weight": (bigq.loading.jobs, "commit_weight", 2),
    "commit of the first tensor": (bigq.loading.jobs, "commit_tensor", 1),
    "commit of the last tensors": (bigq.loading.jobs, "commit_tensor", 18),
    "the first float32 hook": (bigq.offload.dispatch, "attach", 1),
    "the second float32 hook": (bigq.offload.dispatch, "attach", 2),
    "the hook of the root": (bigq.offload.dispatch, "attach", 4),
    "the hook of a block": (bigq.offload.dispatch, "attach", 5),
    "refusing moves": (bigq.offload.dispatch, "refuse_moves", 1),
    "dispatch": (bigq.load_source, "dispatch", 1),
    "the report": (bigq.load_source, "make_report", 1),
    "counting weights": (bigq.load_source, "count_weights", 1),
}


def everything(model):
    """All that a module is made of: class, attributes by identity, what its containers hold, flags and bits."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {}
        for key, value in vars(module).items():
            inside = None
            if isinstance(value, dict):
                inside = [(k, id(v)) for k, v in value.items()]
            elif isinstance(value, (list, set)):
                inside = [id(v) for v in value]
            attributes[key] = (id(value), inside)
        found.append((name, type(module), dict(sorted(attributes.items()))))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    flags = [(name, tensor.requires_grad, tensor.dtype, tensor.device) for name, tensor in tensors]
    return found, flags, {name: tensor.detach().clone() for name, tensor in tensors if not tensor.is_meta}


def assert_same(model, before):
    found, flags, bits = everything(model)
    assert found == before[0]
    assert flags == before[1]
    assert all(torch.equal(bits[name], tensor) for name, tensor in before[2].items())


def fail(monkeypatch, step, error, *, skip=0):
    """Make the call of a step raise once the step was done; `skip` calls go well first."""
    owner, name, at = STEPS[step]
    function, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        out = function(*args, **kwargs)
        calls.append(name)
        if len(calls) == at + skip:
            raise error("on purpose")
        return out

    monkeypatch.setattr(owner, name, failing)
    return calls


@pytest.fixture(params=["on meta", "with weights"])
def model(request, tiny, empty):
    return empty(tiny) if request.param == "on meta" else tiny()


@pytest.mark.parametrize("step", STEPS)
def test_from_a_checkpoint(model, checkpoint, tmp_path, monkeypatch, step):
    before = everything(model)
    for error in (RuntimeError, KeyboardInterrupt):
        with monkeypatch.context() as patched:
            calls = fail(patched, step, error)
            with pytest.raises(error, match="on purpose"):
                load_and_quantize_model(model, checkpoint, HALF, MAP, offload_folder=tmp_path / "offload")
            assert len(calls) == STEPS[step][2], "it failed where it should"
        assert_same(model, before)
    load_and_quantize_model(model, checkpoint, HALF, MAP, offload_folder=tmp_path / "offload")
    assert model.hf_device_map == MAP


@pytest.mark.parametrize("step", [step for step in STEPS if "commit" not in step])
def test_a_model_that_holds_its_weights_is_asked_before_the_first_is_replaced(tiny, tmp_path, monkeypatch, step):
    model = tiny()
    before = everything(model)
    for error in (RuntimeError, KeyboardInterrupt):
        with monkeypatch.context() as patched:
            fail(patched, step, error)
            with pytest.raises(error, match="on purpose"):
                load_and_quantize_model(model, None, HALF, MAP, offload_folder=tmp_path, offload="quantized")
        assert_same(model, before)
    load_and_quantize_model(model, None, HALF, MAP, offload_folder=tmp_path, offload="quantized")
    assert model.hf_device_map == MAP


def test_the_rehearsal_hooks_what_the_load_hooks(tiny, tmp_path, monkeypatch):
    hooked, attach = [], bigq.offload.dispatch.attach
    monkeypatch.setattr(
        bigq.offload.dispatch, "attach", lambda m, hook: hooked.append((m, type(hook))) or attach(m, hook)
    )
    model = tiny()
    load_and_quantize_model(model, None, HALF, MAP, offload_folder=tmp_path, offload="quantized")
    half = len(hooked) // 2
    assert half == 6
    assert hooked[:half] == hooked[half:]


@pytest.mark.parametrize("weights", ["checkpoint", "own"])
@pytest.mark.parametrize("name", ["hf_device_map", "quantization_method", "quantization_report", "is_loaded_in_8bit"])
def test_an_attribute_that_the_model_does_not_let_be_set(tiny, checkpoint, tmp_path, weights, name):
    model = type("ReadOnly", (tiny,), {name: property(lambda self: None)})()
    before = everything(model)
    with pytest.raises(AttributeError, match=name):
        load_and_quantize_model(
            model, checkpoint if weights == "checkpoint" else None, HALF, MAP, offload_folder=tmp_path
        )
    assert_same(model, before)


@pytest.mark.parametrize("weights", ["checkpoint", "own"])
def test_a_module_that_cannot_be_hooked(tiny, checkpoint, tmp_path, weights):
    model = tiny()
    block = type(model.blocks[2])
    model.blocks[2].__class__ = type("Fixed", (block,), {"_hf_hook": property(lambda self: None)})
    before = everything(model)
    with pytest.raises(AttributeError, match="_hf_hook"):
        load_and_quantize_model(
            model, checkpoint if weights == "checkpoint" else None, HALF, MAP, offload_folder=tmp_path
        )
    assert_same(model, before)


def test_flags_that_a_commit_changes_in_place_are_put_back(tiny, checkpoint, tmp_path):
    """What is offloaded is frozen, and a parameter that stays the same object is frozen as that object."""
    model = tiny()
    taken = Snapshot(model.modules())
    before = everything(model)
    model.gain.requires_grad_(False)
    model.offset.requires_grad_()
    taken.restore()
    assert_same(model, before)


def test_recurrent_layers_and_classes_of_graph_modules_are_put_back(tmp_path, monkeypatch):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.up, self.head = nn.LSTM(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.graph = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

        def forward(self, x):
            return self.head(self.graph(self.up(self.rnn(x)[0])))

    model = Recurrent()
    save_file({name: torch.zeros_like(t) for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    before, forward, x = everything(model), type(model.graph).forward, torch.randn(3, 2, 8)
    expected = model(x)
    with monkeypatch.context() as patched:
        fail(patched, "the report", RuntimeError)
        with pytest.raises(RuntimeError, match="on purpose"):
            load_and_quantize_model(
                model,
                tmp_path,
                QuantizationConfig("nf4"),
                {"": "cpu", "rnn": "disk", "graph": "disk"},
                offload="quantized",
                offload_folder=tmp_path / "offload",
            )
    assert_same(model, before)
    assert type(model.graph).forward is forward
    assert torch.equal(model(x), expected)


def test_an_interrupt_after_the_conversion_keeps_what_was_converted(tiny, checkpoint, tmp_path, monkeypatch, ids):
    """The old weights are gone by then; hooks and attributes are not half there."""
    model = tiny()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    with monkeypatch.context() as patched:
        fail(patched, "the report", KeyboardInterrupt, skip=1)
        with pytest.raises(KeyboardInterrupt):
            load_and_quantize_model(model, None, QuantizationConfig("nf4"), "cpu")
    assert not hasattr(model, "hf_device_map")
    expected = load_and_quantize_model(tiny(), checkpoint, QuantizationConfig("nf4"), "cpu")(ids)
    assert torch.equal(model(ids), expected)
