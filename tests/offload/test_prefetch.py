"""Prefetcher and its hook: what is lent is right, whatever the order, the threads, the exceptions and the gradients."""

import copy
import gc
import itertools
import pickle
import random
import threading
import time
import weakref

import pytest
import torch
from torch import nn

from bigq import CheckpointError
from bigq.offload import prefetch, transfer
from bigq.offload.prefetch import Prefetcher
from bigq.offload.space import FileMap, is_file_backed
from bigq.system.internals import COUNTS_HOLDERS, SEES_EDITS
from offloaded_stack import WIDTH, Stack, input_on, offload, prefetcher_of


def test_every_call_sees_its_own_weights(pair):
    model, plain, device = pair
    for _ in range(7):  # five blocks meet two slots in ten ways
        x = input_on(device)
        assert torch.equal(model(x), plain(x))


def test_a_block_is_one_copy(pair):
    model, _, device = pair
    model(input_on(device))
    assert [len(layer._hf_hook.block.layout.extents) for layer in model.layers] == [1] * 5


def test_blocks_are_copied_for_each_call_where_edits_are_not_seen(pair, monkeypatch):
    model, plain, device = pair
    versions = itertools.count()
    monkeypatch.setattr(transfer, "edits_of", lambda tensor: next(versions))
    monkeypatch.setattr(prefetch, "SEES_EDITS", False)
    for _ in range(3):
        x = input_on(device)
        assert torch.equal(model(x), plain(x))


def test_slots_are_two_blocks_large(pair):
    model, _, device = pair
    model(input_on(device))
    slots = prefetcher_of(model)._slots
    assert len(slots) == 2
    assert {slot.buffer.nbytes for slot in slots} == {model.layers[0]._hf_hook.block.layout.nbytes}
    for layer in model.layers:
        assert len(layer.seen) == 1


def test_a_block_is_lent_the_same_tensors_in_a_slot(pair):
    model, _, device = pair
    lent = []
    for layer in model.layers:
        layer.up.register_forward_pre_hook(lambda linear, args: lent.append(weakref.ref(linear.weight)))
    passes = []
    for _ in range(6):  # two slots and five blocks: the same again every second pass
        model(input_on(device))
        passes.append(lent.copy())
        lent.clear()
    assert len(passes[0]) == 5
    if SEES_EDITS and COUNTS_HOLDERS:
        assert passes[4] == passes[2], "dead references differ"
        assert passes[5] == passes[3], "dead references differ"
    else:  # new ones for each call, and those of the passes before are gone
        gc.collect()
        assert [reference() for tensors in passes[:-1] for reference in tensors] == [None] * 25


def test_each_block_is_copied_once_a_pass_and_ahead(pair, monkeypatch):
    model, _, device = pair
    copies = []
    start = transfer.Transfer.start

    def counted(self, layout, buffer, stream):
        copies.append([layer._hf_hook.block.layout for layer in model.layers].index(layout))
        return start(self, layout, buffer, stream)

    model(input_on(device))
    monkeypatch.setattr(transfer.Transfer, "start", counted)
    model(input_on(device))
    if SEES_EDITS:
        assert copies == [2, 3, 4, 0, 1], "two blocks were there from the last pass, and are there for the next"
    else:
        assert copies == [0, 1, 2, 3, 4], "none is ahead: it would be made again"


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 9])
def test_any_number_of_slots(tmp_path, slots):
    plain = Stack()
    model = copy.deepcopy(plain)
    prefetcher = offload(model, tmp_path, slots=slots)
    for _ in range(3):
        x = input_on("cpu")
        assert torch.equal(model(x), plain(x))
    assert len(prefetcher._slots) == min(slots, 5)


@pytest.mark.parametrize("seed", range(5))
def test_any_order(pair, seed):
    model, plain, device = pair
    draw = random.Random(seed)
    for _ in range(6):
        order = [draw.randrange(5) for _ in range(draw.randint(1, 9))]
        x = input_on(device)
        assert torch.equal(model(x, order), plain(x, order)), order


def test_the_order_that_runs_is_learnt(pair, monkeypatch):
    model, _, device = pair
    order = [4, 2, 0]
    model(input_on(device), order)
    model(input_on(device), order)
    missed = []
    idle = Prefetcher._onload

    def onload(self, block, in_place):
        missed.append(block.layout is None or self._held(block.layout) is None)
        return idle(self, block, in_place)

    monkeypatch.setattr(Prefetcher, "_onload", onload)
    model(input_on(device), order)
    assert missed == [not SEES_EDITS] * 3  # nothing is copied ahead where edits are not seen


def test_blocks_that_call_blocks(pair):
    model, plain, device = pair

    def nested(stack, x):
        first, second, third, *_ = stack.layers
        return first(x, then=lambda y: second(y, then=lambda z: third(z, then=lambda u: first(second(u)))))

    x = input_on(device)
    for _ in range(3):
        assert torch.equal(nested(model, x), nested(plain, x))
        assert torch.equal(model(x), plain(x))


def test_an_exception_gives_back_at_every_depth(pair):
    model, plain, device = pair
    first, second, *_ = model.layers
    x = input_on(device)
    for _ in range(3):
        with pytest.raises(ValueError, match="on purpose"):
            first(x, then=lambda y: second(y, then=lambda z: first(z, fail=True)))
        assert torch.equal(model(x), plain(x))


def test_threads(pair):
    model, plain, device = pair
    inputs = [input_on(device) for _ in range(4)]
    expected = [plain(x) for x in inputs]
    wrong, barrier = [], threading.Barrier(4)

    def work(i):
        barrier.wait()
        for _ in range(25):
            if not torch.equal(model(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_slow_thread_keeps_what_it_was_lent(pair):
    """Another thread enters and leaves the same block, and runs all the others, in the middle of a call."""
    model, plain, device = pair
    x = input_on(device)
    in_the_middle, go_on = threading.Event(), threading.Event()

    def wait(y):
        in_the_middle.set()
        go_on.wait()
        return model.layers[0].up(y)

    result = []
    thread = threading.Thread(target=lambda: result.append(model.layers[0](x, then=wait)))
    thread.start()
    in_the_middle.wait()
    for _ in range(2):
        assert torch.equal(model(x), plain(x))
    go_on.set()
    thread.join()
    assert torch.equal(result[0], plain.layers[0](x, then=plain.layers[0].up))


def test_edits_are_seen(pair):
    model, plain, device = pair
    x = input_on(device)

    def both(edit):
        for stack in (model, plain):
            with torch.no_grad():
                edit(stack)
        assert torch.equal(model(x), plain(x))

    both(lambda stack: None)
    for i in (0, 1, 4):  # block 0 lies in a slot already
        both(lambda stack, i=i: stack.layers[i].up.weight.mul_(2))
        both(lambda stack, i=i: setattr(stack.layers[i].up, "bias", nn.Parameter(torch.ones(WIDTH, device=device))))
        both(lambda stack, i=i: setattr(stack.layers[i].up.weight, "data", stack.layers[i].up.weight.data.flip(0)))
    state = {name: torch.full_like(tensor, 0.1, device="cpu") for name, tensor in plain.state_dict().items()}
    both(lambda stack: stack.load_state_dict(state))
    both(lambda stack: stack.load_state_dict({k: (v + 1).to(device) for k, v in state.items()}, assign=True))
    for layer in model.layers:
        layer.cpu()


class Returns(nn.Module):
    """Blocks whose calls leave something of what they were lent behind."""

    def __init__(self, how):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, WIDTH), requires_grad=False)
        self.how, self.kept = how, None

    def forward(self, x):
        if self.how == "views in the output":
            return {"rows": (self.table[:2], self.table[:]), "x": x}
        if self.how == "itself in the output":
            return {"rows": (self.table[:2], self.table), "x": x}
        self.kept = self.table[1:3] if self.how == "view in an attribute" else [self.table]
        return {"rows": (self.table[:2].clone(), self.table.clone()), "x": x}


@pytest.mark.parametrize(
    "how", ["views in the output", "itself in the output", "view in an attribute", "itself in an attribute"]
)
def test_what_outlives_the_call_does_not_change(tmp_path, how):
    model = nn.Module()
    model.layers = nn.ModuleList(Returns(how) for _ in range(4))
    tables = [layer.table.detach().clone() for layer in model.layers]
    prefetcher = offload(model, tmp_path)
    slots = []
    for _ in range(3):
        outputs = [layer(torch.ones(1)) for layer in model.layers]
        for output, table, layer in zip(outputs, tables, model.layers, strict=True):
            assert torch.equal(output["rows"][0], table[:2])
            assert torch.equal(output["rows"][1], table)
            if how == "view in an attribute":
                assert torch.equal(layer.kept, table[1:3])
            elif how == "itself in an attribute":
                assert torch.equal(layer.kept[0], table)
        slots.append(set(prefetcher._slots))
        buffers = {slot.buffer.untyped_storage().data_ptr() for slot in prefetcher._slots}
        for output, layer in zip(outputs, model.layers, strict=True):
            kept = output["rows"][1] if "output" in how else layer.kept[0]
            assert kept.untyped_storage().data_ptr() not in buffers
    if SEES_EDITS:  # otherwise one slot is never used
        assert slots[1].isdisjoint(slots[2]), "what outlives a call takes the slot along"


class TestCopies:
    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_they_run_on_their_own(self, pair, how):
        model, plain, device = pair
        x = input_on(device)
        expected = plain(x)
        model(x)
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert torch.equal(other(x), x)
        assert torch.equal(model(x), expected)
        assert torch.equal(other(x), x)
        if device == "cuda":
            assert all(p.is_pinned() for p in other.parameters())

    def test_a_saved_module_loads(self, pair, tmp_path):
        model, plain, device = pair
        torch.save(model, tmp_path / "model.pt")
        x = input_on(device)
        assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), plain(x))


def test_a_file_cut_short_is_an_error_and_then_it_is_not(tmp_path, monkeypatch):
    plain = Stack()
    model = copy.deepcopy(plain)
    offload(model, tmp_path)
    x = input_on("cpu")
    read = FileMap.read

    def short(self, offset, into):
        if offset >= 2 * model.layers[0]._hf_hook.block.layout.nbytes:
            raise CheckpointError("cut short")
        read(self, offset, into)

    monkeypatch.setattr(FileMap, "read", short)
    for _ in range(3):
        with pytest.raises(CheckpointError, match="cut short"):
            model(x)
        assert all(is_file_backed(p) for p in model.parameters())
    monkeypatch.setattr(FileMap, "read", read)
    assert torch.equal(model(x), plain(x))


@pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen, so nothing is copied ahead")
def test_reads_are_made_while_the_block_before_runs(tmp_path, monkeypatch):
    model = Stack(3)
    prefetcher = offload(model, tmp_path)
    model(input_on("cpu"))
    for slot in prefetcher._slots:
        slot.wait_for_reads()  # made ahead for the next pass; they are not the ones to watch
    read, running, overlapped = FileMap.read, threading.Event(), []

    def watched(self, offset, into):
        overlapped.append(running.wait(5))
        read(self, offset, into)

    monkeypatch.setattr(FileMap, "read", watched)

    def compute(module, args, out):
        running.set()
        while not overlapped:
            time.sleep(0.001)

    model.layers[1].up.register_forward_hook(compute)
    model.layers[0](input_on("cpu"))  # its slot is free for the last block then
    model.layers[1](input_on("cpu"))
    assert overlapped[0], "of the last block, by a thread"


@pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen, so nothing is copied ahead")
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_a_copy_that_is_needed_soon_keeps_its_slot(tmp_path, monkeypatch, slots):
    """Each block is copied once a pass, and all slots are filled while no block runs."""
    model = Stack()
    prefetcher = offload(model, tmp_path, slots=slots)
    for _ in range(2):
        model(input_on("cpu"))
    copies, start = [], transfer.Transfer.start
    layouts = [layer._hf_hook.block.layout for layer in model.layers]
    monkeypatch.setattr(
        transfer.Transfer, "start", lambda self, layout, *how: copies.append(layout) or start(self, layout, *how)
    )
    assert all(prefetcher._held(layout) is not None for layout in layouts[:slots])
    model(input_on("cpu"))
    assert list(map(layouts.index, copies)) == [(slots + i) % 5 for i in range(5)]


@pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen, so nothing is copied ahead")
def test_a_copy_ahead_that_fails_hides_no_output(tmp_path, monkeypatch):
    plain = Stack(3)
    model = copy.deepcopy(plain)
    offload(model, tmp_path)
    x = input_on("cpu")
    assert torch.equal(model(x), plain(x))
    start = transfer.Transfer.start

    def failing(self, layout, *how):
        raise CheckpointError("no memory to read into")

    expected = plain.layers[0](x)
    monkeypatch.setattr(transfer.Transfer, "start", failing)
    assert torch.equal(model.layers[0](x), expected), "its copy was there, and that of block 2 fails when it ends"
    monkeypatch.setattr(transfer.Transfer, "start", start)
    assert torch.equal(model(x), plain(x))


def test_inference_mode_leaves_nothing_behind(pair):
    model, plain, device = pair
    x = input_on(device)
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    y = x.clone().requires_grad_()
    model(y).sum().backward()
    assert torch.equal(y.grad, torch.autograd.grad(plain(y).sum(), y)[0])


def test_autocast(pair):
    model, plain, device = pair
    x = input_on(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        for _ in range(2):
            assert torch.equal(model(x), plain(x))


@pytest.mark.gpu
def test_streams_are_in_order_whatever_the_host_does(tmp_path):
    """Long kernels, short ones, and a host that dawdles at random: the copies must wait for what still reads a slot."""
    plain = nn.Module()
    plain.layers = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(6))
    model = copy.deepcopy(plain)
    offload(model, tmp_path, "cuda", "cpu")
    plain.cuda()
    draw = random.Random(0)
    for _ in range(30):
        x = y = torch.randn(draw.choice([1, 4096]), 2048, device="cuda")
        for mine, theirs in zip(model.layers, plain.layers, strict=True):
            if draw.random() < 0.3:
                torch.cuda._sleep(draw.randrange(5_000_000))
            if draw.random() < 0.3:
                time.sleep(draw.random() * 0.003)
            x, y = torch.tanh(mine(x)), torch.tanh(theirs(y))
        assert torch.equal(x, y)
