"""A hooked module pickles, shows its signature, and compiles once for all blocks of a kind."""

import copy
import inspect
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model
from bigq.offload.attach import attach
from bigq.offload.space import is_file_backed


class Add(ModelHook):
    def __init__(self, amount):
        self.amount = amount

    def pre_forward(self, module, *args, **kwargs):
        return (args[0] + self.amount,), kwargs


def test_hooks_run_in_the_order_they_came():
    module = nn.Identity()
    attach(module, Add(1))
    attach(module, Add(2))
    assert isinstance(module._hf_hook, SequentialHook)
    assert module(torch.zeros(1)).item() == 3
    remove_hook_from_module(module)
    assert module(torch.zeros(1)).item() == 0
    assert type(module).forward is nn.Identity.forward


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_their_own_hook(how):
    module = nn.Linear(2, 2)
    attach(module, Add(1))
    other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    nn.init.zeros_(other.weight)
    nn.init.constant_(other.bias, 5)
    other._hf_hook.amount = 100
    x = torch.zeros(1, 2)
    assert torch.equal(module(x), nn.functional.linear(x + 1, module.weight, module.bias))
    assert other(x).tolist() == [[5.0, 5.0]]
    remove_hook_from_module(other)
    assert other(x).tolist() == [[5.0, 5.0]]


def test_the_signature_is_that_of_the_module():
    module = nn.Bilinear(2, 2, 2)
    attach(module, Add(1))
    assert list(inspect.signature(module.forward).parameters) == ["input1", "input2"]


@pytest.fixture
def model(tiny, checkpoint, empty, tmp_path):
    return load_and_quantize_model(
        empty(tiny),
        checkpoint,
        QuantizationConfig("nf4"),
        {"": "cpu", "blocks": "disk"},
        offload="quantized",
        offload_folder=tmp_path,
    )


class TestTools:
    def test_align_module_device(self, model, ids):
        """It moves tensors away and brings others back, not in the memory that was reserved for them."""
        expected = model(ids)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for block in model.blocks:
            with align_module_device(block.norm, device), torch.no_grad():
                assert block.norm.weight.device.type == device.type
                block.norm.weight.mul_(2)
        doubled = model(ids)
        assert not torch.equal(doubled, expected)
        for block in model.blocks:
            with align_module_device(block.norm, device), torch.no_grad():
                block.norm.weight.div_(2)
        assert torch.equal(model(ids), expected)

    def test_another_hook_on_top(self, model, ids):
        expected = model(ids)

        class Count(ModelHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                Count.calls += 1
                return args, kwargs

        add_hook_to_module(model.blocks[1], Count(), append=True)
        assert torch.equal(model(ids), expected)
        assert Count.calls == 1
        assert is_file_backed(model.blocks[1].up.weight_packed)

    def test_prepare_for_evaluation(self, model, ids):
        expected = model(ids)
        prepared = Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
        assert torch.equal(prepared(ids), expected)

    def test_prepare_for_training(self, model, ids):
        """accelerate refuses to train an offloaded model that says it is a k-bit one: its own could not be trained."""
        x = torch.nn.Parameter(torch.zeros(2, 7, 72))
        model.embed.register_forward_hook(lambda module, args, out: out + x)
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD([x], lr=1.0))
        accelerator.backward(prepared(ids).square().mean())
        optimizer.step()
        assert x.abs().sum() > 0


class TestCompile:
    @pytest.mark.parametrize("how", ["compile", "torch.compile"])
    def test_blocks_of_a_kind_compile_once(self, tiny, checkpoint, empty, tmp_path, how, ids):
        torch._dynamo.reset()
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        model = load_and_quantize_model(
            empty(tiny),
            checkpoint,
            QuantizationConfig("nf4"),
            {"": "cpu", "blocks": "disk"},
            offload="preserve",
            offload_folder=tmp_path,
        )
        expected = model(ids)
        for i, block in enumerate(model.blocks):
            if how == "compile":
                block.compile(backend=backend)
            else:
                model.blocks[i] = torch.compile(block, backend=backend)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(ids), expected)
            first = len(compiled)
            assert first > 0
            assert first == len({graph.code for graph in compiled}), "one block's graphs serve all"
