"""Frozen shards of a model of one's own: what blocks may return, inference mode, and writes that would be lost."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model
from ranks import error_of, mesh_of, own_device, run_ranks

SMALLEST = 1024  # bytes: tensors as small as these are cut
WIDTH = 64


@dataclass
class Out:
    hidden: torch.Tensor


class Box:
    def __init__(self, hidden):
        self.hidden = hidden


class Block(nn.Module):
    """A quantized linear of 130 rows, one that is kept, and an adapter; `wrap` is what it returns its output in."""

    def __init__(self, wrap):
        super().__init__()
        self.up, self.down, self.kept = nn.Linear(WIDTH, 130), nn.Linear(130, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.adapter = nn.Parameter(torch.randn(WIDTH))
        self.wrap = wrap

    def forward(self, x):
        y = self.kept(x * self.adapter) + self.down(torch.relu(self.up(x)))
        return self.wrap(y) if self.wrap else y


class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.blocks = nn.ModuleList(Block(wrap) for _ in range(4))
        self.head = nn.Linear(WIDTH, 101)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x if isinstance(x, torch.Tensor) else x.hidden
        return self.head(x)


def _model(wrap=None):
    torch.manual_seed(0)
    config = QuantizationConfig("nf4", rules={"*kept": None})
    model = load_and_quantize_model(Net(wrap), None, config, own_device()).requires_grad_(False)
    for block in model.blocks:
        block.adapter.requires_grad_(True)
    return model


def _step(model):
    """The outputs of one step, and the gradients of the adapters."""
    model.zero_grad()
    out = model(torch.linspace(-1, 1, 2 * WIDTH, device=own_device()).view(2, WIDTH))
    out.square().mean().backward()
    return [out.detach(), *(block.adapter.grad for block in model.blocks)]


def _same(one, model):
    return all(torch.equal(a, b) for a, b in zip(_step(one), _step(model), strict=True))


def _after_inference(pair):
    one, model = pair()
    x = torch.ones(2, WIDTH, device=own_device())
    with torch.inference_mode():
        same = torch.equal(one(x), model(x))
    return same, _same(one, model)


def _written(pair):
    """What is said of writes to whole weights, and whether the numbers are those of one process before and after."""
    from bigq.integrations.frozen_shards import reshard_frozen

    one, model = pair()
    found = [_same(one, model)]  # from here on the first two blocks are whole
    with torch.no_grad():
        model.blocks[0].kept.weight.zero_()
    said = [error_of(lambda: reshard_frozen(model)), error_of(lambda: reshard_frozen(model))]
    found.append(_same(one, model))
    given = {"blocks.0.up.weight": torch.zeros(130, WIDTH, device=own_device())}
    said.append(error_of(lambda: model.load_state_dict(given, strict=False)))
    found.append(_same(one, model))
    with torch.no_grad():
        model.blocks[0].kept.weight.zero_()
    said.append(error_of(lambda: _step(model)))
    found.append(_same(one, model))
    return said, found


def _second_order(pair):
    model = pair()[1]
    adapters = [block.adapter for block in model.blocks]
    out = model(torch.ones(2, WIDTH, device=own_device()))
    return error_of(lambda: torch.autograd.grad(out.square().mean(), adapters, create_graph=True))


def _ignored(mesh):
    from bigq.integrations.frozen_shards import shard_frozen

    model = _model()
    model._ddp_params_and_buffers_to_ignore = ["blocks.0.adapter"]
    return shard_frozen(model, mesh)._ddp_params_and_buffers_to_ignore


def _work(rank):
    from bigq.integrations.frozen_shards import shard_frozen

    mesh = mesh_of(torch.distributed.get_world_size())

    def pair(wrap=None):
        return _model(wrap), shard_frozen(_model(wrap), mesh)

    with mock.patch("bigq.integrations.frozen_shards.SMALLEST", SMALLEST):
        return {
            "plain": _same(*pair()),
            "dataclass": _same(*pair(Out)),
            "box": error_of(lambda: _step(pair(Box)[1])),
            "inference": _after_inference(pair),
            "second order": _second_order(pair),
            "written": _written(pair),
            "ignored": _ignored(mesh),
        }


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory, nccl):
    return run_ranks(_work, tmp_path_factory.mktemp("any"), world=request.param, gpus=nccl)


def test_blocks_may_return_tensors_and_dataclasses_of_them(found):
    assert all(each["plain"] and each["dataclass"] for each in found)


def test_a_block_that_returns_no_tensor_is_refused(found):
    for each in found:
        assert each["box"].startswith("UnsupportedError: Block returns Box without a tensor in it")


def test_gradients_of_gradients_are_refused(found):
    for each in found:
        assert each["second order"].startswith("UnsupportedError: a gradient of a gradient")


def test_a_model_that_ran_in_inference_mode_trains_then(found):
    assert [each["inference"] for each in found] == [(True, True)] * len(found)


def test_a_write_to_a_whole_weight_raises_an_error_once(found):
    for (first, again, loaded, in_step), same in (each["written"] for each in found):
        lost = "UnsupportedError: weight of Linear was written to while it was gathered for a call"
        assert first.startswith(lost)
        assert again == ""
        assert "a weight of QuantizedLinear is written while it is gathered" in loaded
        assert in_step.startswith(lost)
        assert same == [True] * 4


def test_what_ddp_ignores_already_it_still_does(found):
    for each in found:
        assert "blocks.0.adapter" in each["ignored"]
        assert "blocks.0.up.weight_packed" in each["ignored"]
