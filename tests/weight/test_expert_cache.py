"""ExpertCache: which calls it serves, what its slots hold then, and what it takes in memory."""

import copy
import pickle

import pytest
import torch

from bigq import ops
from bigq.errors import UnsupportedError
from bigq.formats import TensorSpec
from bigq.ops import eager
from bigq.weight.expert_cache import ExpertCache, ExpertUse

EXPERTS, SLOTS = 6, 4
PARTS = {  # of one expert
    "packed": ((3, 16), torch.uint8),
    "absmax": ((3, 1), torch.int32),
    "bias": ((3,), torch.bfloat16),  # six bytes: no whole words of four
    "flags": ((5,), torch.uint8),
}


def specs(count):
    parts = {name: TensorSpec(shape=(count, *shape), dtype=dtype) for name, (shape, dtype) in PARTS.items()}
    return parts | {"offset": TensorSpec(shape=(1,), dtype=torch.int32)}


def views():
    return {name: torch.randint(0, 100, spec.shape).to(spec.dtype) for name, spec in specs(EXPERTS).items()}


@pytest.fixture
def cache():
    return ExpertCache(specs(SLOTS), ["offset"], experts=EXPERTS, slots=SLOTS, device=torch.device("cpu"))


def fetched(cache, held, *ids):
    with torch.no_grad():
        return cache.fetch(held, torch.tensor(ids))


def assert_holds(use, held, *ids):
    """The slots of `ids` hold the parts of these experts."""
    assert use.slots.tolist() != []
    for slot, expert in zip(use.slots.tolist(), ids, strict=True):
        for name in PARTS:
            assert torch.equal(use.tensors[name][slot], held[name][expert]), name
    assert torch.equal(use.tensors["offset"], held["offset"])


def test_slots_hold_the_experts_of_a_call(cache):
    held = views()
    cache.read_from(held)
    for ids in ((3, 0), (5, 3, 5), (1, 2, 4, 0), (4,)):
        use = fetched(cache, held, *ids)
        assert_holds(use, held, *ids)
        use.end()


def test_only_a_call_that_holds_the_views_is_served(cache):
    held, other = views(), views()
    assert fetched(cache, held, 1) is None, "nothing is read in host memory"
    cache.read_from(held)
    assert fetched(cache, {**held, "bias": other["bias"]}, 1) is None
    assert fetched(cache, {}, 1) is None
    assert fetched(cache, {**held, "another": None}, 1) is not None


def test_other_views_empty_the_slots(cache):
    held, other = views(), views()
    cache.read_from(held)
    fetched(cache, held, 1, 2).end()
    cache.read_from(other)
    assert fetched(cache, held, 1) is None
    use = fetched(cache, other, 2, 1)
    assert_holds(use, other, 2, 1)


def test_the_same_views_after_an_edit_are_announced_anew_and_empty_the_slots(cache):
    held = views()
    cache.read_from(held)
    fetched(cache, held, 1, 2).end()
    held["packed"].add_(1)
    held["offset"].add_(1)
    again = dict(held)
    cache.read_from(again)
    assert_holds(fetched(cache, again, 2, 1), again, 2, 1)


def test_what_is_not_served(cache):
    held = views()
    cache.read_from(held)
    assert fetched(cache, held, *[1] * (SLOTS + 1)) is None, "more rows than slots"
    assert fetched(cache, held) is None
    assert cache.fetch(held, torch.tensor([1])) is None, "gradients are computed"
    assert cache._held.tolist() == [-1] * SLOTS


def test_one_use_at_a_time(cache):
    held = views()
    cache.read_from(held)
    use = fetched(cache, held, 1, 2, 3, 4)
    assert fetched(cache, held, 5) is None
    assert_holds(use, held, 1, 2, 3, 4)
    use.end()
    use = fetched(cache, held, 5)
    assert_holds(use, held, 5)
    del use  # as an interrupt leaves it
    assert fetched(cache, held, 1) is not None


def test_a_call_that_failed_leaves_slots_that_are_not_trusted(cache):
    held = views()
    cache.read_from(held)
    fetched(cache, held, 1, 2).end()
    with pytest.raises(RuntimeError, match=r"ids is torch\.float32"), torch.no_grad():
        cache.fetch(held, torch.tensor([3.0]))
    cache.tensors["packed"].zero_()
    assert_holds(fetched(cache, held, 2, 1), held, 2, 1)


@pytest.mark.parametrize("step", ["assign_slots", "fill_slots"])
def test_a_graph_that_is_replayed_after_a_call_that_failed_finds_no_slots_that_lie(cache, monkeypatch, step):
    """A replay asks nobody whether the last call has copied what it noted."""
    held, call_op = views(), eager.call_op
    cache.read_from(held)
    fetched(cache, held, 1, 2).end()

    def fail(name, *args):
        made = None if name == "fill_slots" else call_op(name, *args)
        if name == step:
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(eager, "call_op", fail)
        with pytest.raises(KeyboardInterrupt):
            fetched(cache, held, 3, 1)
    replayed = ExpertUse(cache.tensors)
    replayed.slots, copies = ops.assign_slots(torch.tensor([3, 1]), cache._held, cache._stamps, EXPERTS)
    ops.fill_slots(copies, cache._sources, cache._pools)
    assert_holds(replayed, held, 3, 1)


class Stream:
    """A stream that notes for whom it waits, and memory that notes who uses it."""

    def __init__(self):
        self.waited, self.used_by = [], []

    def wait_stream(self, other):
        self.waited.append(other)

    def record_stream(self, stream):
        self.used_by.append(stream)


@pytest.fixture
def streams(monkeypatch, cache):
    """What torch says of streams: "current", and whether it is "capturing"."""
    said = {"current": Stream(), "capturing": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: said["current"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: said["capturing"])
    cache._stream, cache._buffer = said["current"], Stream()
    return said


def test_another_stream_waits_for_the_one_that_used_the_slots_last(cache, streams):
    held, first, second = views(), streams["current"], Stream()
    cache.read_from(held)
    fetched(cache, held, 1).end()
    assert (first.waited, cache._buffer.used_by) == ([], [])
    streams["current"] = second
    for _ in range(2):
        fetched(cache, held, 1).end()
    assert second.waited == [first]
    assert cache._buffer.used_by == [second], "its memory is not given to others while that stream uses it"
    streams["current"] = first
    fetched(cache, held, 1).end()
    assert first.waited == [second]


def test_a_stream_that_is_captured_waits_for_nothing_and_is_not_remembered(cache, streams):
    held, first = views(), streams["current"]
    cache.read_from(held)
    fetched(cache, held, 1).end()
    streams.update(current=Stream(), capturing=True)
    fetched(cache, held, 2).end()
    assert streams["current"].waited == []
    assert cache._stream is first


def test_a_capture_that_failed_has_noted_nothing_and_queues_nothing_more(cache, streams, monkeypatch):
    held = views()
    cache.read_from(held)
    fetched(cache, held, 1).end()
    streams.update(capturing=True)

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(eager, "call_op", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        fetched(cache, held, 2)
    assert 1 in cache._held.tolist()


def test_slots_are_not_emptied_while_a_graph_is_captured(cache, streams, monkeypatch):
    monkeypatch.setattr(cache, "device", torch.device("cuda"))
    held, other = views(), views()
    cache.read_from(held)
    cache.empty()
    streams["capturing"] = True
    fetched(cache, held, 1).end()
    cache.read_from(other)
    with pytest.raises(UnsupportedError, match=r"call the model once, or bigq\.cache_experts again, before"):
        fetched(cache, other, 1)
    streams["capturing"] = False
    assert_holds(fetched(cache, other, 1), other, 1)


def test_the_memory_is_what_it_says():
    sizes = [ExpertCache.nbytes_of(specs(slots), slots) for slots in range(EXPERTS + 1)]
    assert sizes == sorted(sizes)
    cache = ExpertCache(specs(SLOTS), ["offset"], experts=EXPERTS, slots=SLOTS, device=torch.device("cpu"))
    assert cache.nbytes == sizes[SLOTS] == 7 * 256
    held = {name: (tensor.shape, tensor.dtype) for name, tensor in cache.tensors.items()}
    assert held == {name: (torch.Size(spec.shape), spec.dtype) for name, spec in specs(SLOTS).items()}
    starts = sorted(tensor.data_ptr() - cache._buffer.data_ptr() for tensor in cache.tensors.values())
    assert starts == [512, 768, 1024, 1280, 1536]


def test_the_copy_of_a_module_has_none(cache):
    assert copy.deepcopy(cache) is None
    assert pickle.loads(pickle.dumps(cache)) is None
