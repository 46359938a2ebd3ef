"""newcomers: what is added to an offloaded block goes to its device, and nothing else does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bigq.offload import hooks, newcomers
from bigq.offload.attach import attach
from bigq.offload.block import OffloadedBlock
from bigq.offload.hooks import PlacementHook
from bigq.offload.newcomers import latest_registration, settle
from bigq.offload.prefetch import Prefetcher

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return self.inner(x) * self.scale


def with_adapter(block):
    block.adapter = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    return block


def names(module):
    return {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


@pytest.fixture
def moved_names(monkeypatch):
    """moved_names(module, offloaded): what `settle` moves to a GPU, which this machine may not have."""

    def settled_names(module, offloaded=()):
        moves = []
        monkeypatch.setattr(newcomers, "_move", lambda tensor, device: moves.append((id(tensor), device)))
        settle(module, offloaded, GPU)
        found = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        assert all(device == GPU for _, device in moves)
        return {found[moved] for moved, _ in moves}

    return settled_names


def test_new_tensors_move_and_offloaded_ones_stay(moved_names):
    block = with_adapter(Block())
    offloaded = [(block.inner, "weight"), (block.inner, "bias"), (block, "scale")]
    assert moved_names(block, offloaded) == {name for name in names(block) if name.startswith("adapter.")}


def test_nothing_moves_to_the_cpu_and_nothing_from_elsewhere(moved_names):
    block = with_adapter(Block()).to("meta")
    settle(block, [], CPU)
    assert moved_names(block) == set()


def test_parts_with_a_hook_and_scripts_are_left_alone(moved_names):
    root = nn.ModuleList([with_adapter(Block()), torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4)])
    attach(root[0], PlacementHook(CPU))
    assert moved_names(root) == {"2.weight", "2.bias"}


@pytest.mark.parametrize(
    "register", [with_adapter, lambda block: setattr(block.inner, "bias", nn.Parameter(torch.ones(4)))]
)
def test_modules_and_parameters_are_noticed(register):
    before = latest_registration()
    register(Block())
    assert latest_registration() != before
    before = latest_registration()
    torch.ones(3).requires_grad_()
    assert latest_registration() == before


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_a_slice_of_known_layers_is_nothing_new(moved_names, kind):
    layers = kind([Block(), Block(), Block()]) if kind is nn.ModuleList else kind(Block(), Block(), Block())
    before = latest_registration()
    assert len(layers[:2]) == 2
    assert latest_registration() != before, "nobody has looked through these"
    moved_names(layers)
    before = latest_registration()
    assert len(layers[:2]) == 2
    assert latest_registration() == before
    with_adapter(layers[1])
    assert latest_registration() != before
    before = latest_registration()
    layers[0].inner = layers[2].inner  # it may have been moved to the CPU since
    assert latest_registration() != before


@pytest.fixture
def settled(monkeypatch):
    """The modules that were looked through."""
    seen = []
    monkeypatch.setattr(
        hooks, "settle", lambda module, offloaded, device: seen.append((module, list(offloaded), device))
    )
    return seen


@pytest.mark.parametrize("has_block", [True, False], ids=["block", "root"])
def test_a_hook_looks_once_for_what_was_registered(settled, has_block):
    module = Block()
    block = OffloadedBlock([(module.inner, "weight")], ahead=True) if has_block else None
    prefetcher = Prefetcher(CPU) if has_block else None
    if has_block:
        prefetcher.add(block)
    attach(module, PlacementHook(CPU, block=block, prefetcher=prefetcher))
    with torch.no_grad():
        module(torch.ones(1, 4))
        module(torch.ones(1, 4))
        assert settled == [(module, [(module.inner, "weight")] if has_block else [], CPU)]
        with_adapter(module)
        module(torch.ones(1, 4))
        module(torch.ones(1, 4))
    assert len(settled) == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_looks_at_itself(settled, copied):
    module = Block()
    attach(module, PlacementHook(CPU))
    module(torch.ones(1, 4))
    again = copied(module)
    again(torch.ones(1, 4))
    assert [seen for seen, _, _ in settled] == [module, again]


@pytest.mark.gpu
def test_an_optimizer_trains_what_was_moved():
    block = with_adapter(Block())
    optimizer = torch.optim.AdamW(block.adapter.parameters(), lr=0.1)
    before = block.adapter[0].weight.detach().clone()
    settle(block, [(block.inner, "weight"), (block.inner, "bias"), (block, "scale")], GPU)
    block.adapter(torch.randn(3, 4, device="cuda")).square().sum().backward()
    optimizer.step()
    assert block.adapter[0].weight.is_cuda
    assert not torch.equal(block.adapter[0].weight.cpu(), before)
    assert not block.inner.weight.is_cuda


@pytest.mark.gpu
def test_a_gradient_moves_with_its_parameter():
    block = with_adapter(Block())
    block.adapter(torch.ones(2, 4)).sum().backward()
    weight = block.adapter[0].weight
    settle(block, [], GPU)
    assert block.adapter[0].weight is weight
    assert weight.is_cuda
    assert weight.grad.is_cuda
    assert block.adapter[1].running_mean.is_cuda


class Replacing(nn.Module):
    """Assigns a module while it runs, as some code of transformers does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        self.inner = self.inner
        return self.inner(x)


def test_compiled_code_is_not_compiled_again_when_something_is_registered():
    latest_registration()
    model, x = Replacing(), torch.ones(1, 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    nn.Linear(2, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), expected)
