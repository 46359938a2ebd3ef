"""Frozen shards of a model of one's own: what blocks return, inference mode, lost writes, copies and skipped blocks."""

import os
import pickle
import time
from copy import deepcopy
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
        self.wrap, self.way = wrap, ""

    def forward(self, x):
        if self.way == "idle":
            return x
        if self.way == "in place":
            return x.add_(self.down(torch.relu(self.up(x + self.adapter))))
        y = self.kept(x * self.adapter) + self.down(torch.relu(self.up(x)))
        return self.wrap(y) if self.wrap else y


class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.blocks = nn.ModuleList(Block(wrap) for _ in range(4))
        self.head = nn.Linear(WIDTH, 101)
        self.skipped = ()

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = x if index in self.skipped else block(x)
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
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(_step(one), _step(model), strict=True))


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


def _unchanged(pair, idle=(), in_place=()):
    """Whether a step has the bits of one process if some blocks return what they got, or add to it in place."""
    models = pair()
    for model in models:
        for index, block in enumerate(model.blocks):
            block.way = "idle" if index in idle else "in place" if index in in_place else ""
    return _same(*models)


def _skipped(pair):
    """Whether a step has the bits of one process if all processes skip two blocks."""
    one, model = pair()
    one.skipped = model.skipped = (1, 2)
    return _same(one, model)


def _skipped_in_one(rank, pair):
    """Whether a step has the bits of one process, and what is said if only the last process skips two blocks then."""
    from bigq.integrations.frozen_shards import reshard_frozen

    one, model = pair()
    same = _same(one, model)
    reshard_frozen(model)
    if rank == torch.distributed.get_world_size() - 1:
        model.skipped = (1, 2)

    def step():
        _step(model)
        reshard_frozen(model)  # a GPU has told by now

    return same, error_of(step)


class Pair(nn.Module):
    """Two linears of one shape, whose rows are gathered where the whole stands."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.first = first

    def forward(self, x):
        return self.b(self.a(x)) if self.first == "a" else self.a(self.b(x))


def _in_another_order(rank, mesh):
    """What is said where the last process calls two linears in another order than the rest."""
    from bigq.integrations.frozen_shards import reshard_frozen, shard_frozen

    pair = Pair("b" if rank == mesh.size() - 1 else "a").to(own_device()).requires_grad_(False)
    x = torch.ones(1, WIDTH, device=own_device())
    pair(x)  # the first product of a process waits for a GPU, and for gathers that never end
    model = shard_frozen(pair, mesh)

    def call():
        model(x)
        reshard_frozen(model)

    return error_of(call)


def _copied(pair):
    """Whether a deepcopy computes as the model does, and apart from it; whether it takes shards; what is refused."""
    from bigq.integrations.frozen_shards import reshard_frozen

    one, model = pair()
    new = deepcopy(model)
    same = [_same(one, model), _same(one, new)]  # from here on, some blocks of both are whole
    copy = deepcopy(model)
    reshard_frozen(copy)
    held = {hasattr(own, "to_local") for own in copy.parameters() if not own.requires_grad and own.nbytes >= SMALLEST}
    copy = deepcopy(model)
    same += [_same(one, copy), _same(one, model)]
    reshard_frozen(copy)
    with torch.no_grad():
        copy.blocks[1].kept.weight.zero_()
    same += [_same(one, model), _same(one, new), not _same(one, copy)]
    said = [error_of(lambda: deepcopy(model.blocks[1])), error_of(lambda: pickle.dumps(model))]
    return same, held, said


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
            "idle": [_unchanged(pair, idle=idle) for idle in ((0,), (1,), (2,), (1, 2), (3,))],
            "in place": [_unchanged(pair, in_place=in_place) for in_place in ((1, 2), (1, 2, 3))],
            "inference": _after_inference(pair),
            "second order": _second_order(pair),
            "written": _written(pair),
            "ignored": _ignored(mesh),
            "copied": _copied(pair),
            "skipped": _skipped(pair),
        }


def _mix(rank, folder, cases):
    """What is said where processes run different modules. Collectives may wait in vain then, so the process ends."""
    from bigq.integrations.frozen_shards import shard_frozen

    mesh = mesh_of(torch.distributed.get_world_size())
    with mock.patch("bigq.integrations.frozen_shards.SMALLEST", SMALLEST):
        found = {}
        if "order" in cases:
            found["order"] = _in_another_order(rank, mesh)
        if "skip" in cases:
            found["skip"] = _skipped_in_one(rank, lambda: (_model(), shard_frozen(_model(), mesh)))
    torch.save(found, f"{folder}/{rank}.pt")
    time.sleep(1)  # another one may still read the memory of this one
    os._exit(0)


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory, nccl):
    return run_ranks(_work, tmp_path_factory.mktemp("any"), world=request.param, gpus=nccl)


def test_blocks_may_return_tensors_and_dataclasses_of_them(found):
    assert all(each["plain"] and each["dataclass"] for each in found)


def test_blocks_may_return_what_they_got(found):
    assert [each["idle"] for each in found] == [[True] * 5] * len(found)
    assert [each["in place"] for each in found] == [[True] * 2] * len(found)


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


def test_a_deepcopy_has_shards_of_its_own(found):
    for same, held, (part, pickled) in (each["copied"] for each in found):
        assert same == [True] * 7
        assert held == {True}
        assert part.startswith("UnsupportedError: a part of Net was to be copied")
        assert "copy the model that shard_frozen was called with" in part
        assert pickled.startswith("UnsupportedError: Net is in frozen shards and was to be pickled")


def test_processes_that_skip_the_same_blocks_compute_as_one(found):
    assert all(each["skipped"] for each in found)


@pytest.fixture(scope="module", params=[2, 3])
def mixed(request, tmp_path_factory, nccl):
    found = [{} for _ in range(request.param)]
    # A GPU waits for the first case's gathers for ever, so the second one has processes of its own.
    for cases in (["order"], ["skip"]) if nccl else (["order", "skip"],):
        folder = tmp_path_factory.mktemp("mixed")
        for all_found, each in zip(
            found, run_ranks(_mix, folder, str(folder), cases, world=request.param, gpus=nccl), strict=True
        ):
            all_found.update(each)
    return found


def test_shards_of_two_blocks_are_not_mixed(mixed):
    last = len(mixed) - 1
    for rank, (same, said) in enumerate(each["skip"] for each in mixed):
        other, own, theirs = (0, "blocks.3", "blocks.2") if rank == last else (last, "blocks.2", "blocks.3")
        assert same
        assert said.startswith(
            f"UnsupportedError: this process gathered {own} and process {other} of the mesh {theirs} at the same time"
        )
        assert "layerdrop" in said


def test_linears_in_another_order_are_not_mixed(mixed):
    last = len(mixed) - 1
    for rank, said in enumerate(each["order"] for each in mixed):
        other, own, theirs = (0, "b", "a") if rank == last else (last, "a", "b")
        assert said.startswith(
            f"UnsupportedError: this process gathered {own} and process {other} of the mesh {theirs}"
        )
