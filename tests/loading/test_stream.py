"""stream: every tensor arrives as it was written, in file order, within the budget, or not at all."""

import errno
import gc
import os
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

import bigq.loading.stream
from bigq import CheckpointError, ConfigError
from bigq.checkpoint import Checkpoint
from bigq.loading.runs import Target
from bigq.loading.stream import Budget, stream
from bigq.loading.timings import Timings
from bigq.model.in_place import ModelTensors
from bigq.testing import FaultyBytes, with_bytes
from sources import stacked

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda:0")] if torch.cuda.is_available() else [])]
BUDGET = Budget(threads=3, nbytes=8 << 20)
SMALL = Budget(threads=3, nbytes=1 << 15)  # chunks of 5 kB that end inside elements, runs of 8 KiB, four at once


def targets(checkpoint, device=CPU, names=None, *, own=False):
    """Every tensor to `device`, lent or in memory of its own."""

    def memory(info):
        return lambda: torch.empty(info.shape, dtype=info.dtype, device=device)

    infos = checkpoint.tensors
    return {name: Target(device=device, allocate=memory(infos[name]) if own else None) for name in names or infos}


def arrivals(checkpoint, wanted, budget=BUDGET, **kwargs):
    """{name: tensor}, put together from its pieces, copied while they are lent."""
    arrived = {}
    for pieces in stream(checkpoint, wanted, budget, Timings(), **kwargs):
        for piece in pieces:
            name = piece.info.name
            assert piece.tensor.device == wanted[name].device
            assert piece.is_temporary == (wanted[name].allocate is None)
            assert piece.start == (len(arrived[name]) if name in arrived else 0)
            before = [arrived[name]] if name in arrived else []
            arrived[name] = torch.cat([*before, piece.tensor.cpu()]) if before else piece.tensor.cpu().clone()
    return arrived


def assert_equal(arrived, tensors, names=None):
    assert list(arrived) == list(names or arrived)
    for name, tensor in arrived.items():
        assert torch.equal(tensor, tensors[name]), name
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)


@pytest.fixture
def tensors():
    return {
        "big": torch.randn(300, 1000),
        "half": torch.randn(70, 33).half(),
        "bytes": torch.randint(0, 256, (5001,), dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(9, 9).bfloat16(),
        "long": torch.randn(2, 9000),
    }


@pytest.fixture
def checkpoint(tensors, tmp_path):
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:4]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[4:]}, tmp_path / "model-00002-of-00002.safetensors")
    return Checkpoint.open(tmp_path)


@pytest.mark.parametrize("own", [False, True], ids=["lent", "own"])
@pytest.mark.parametrize("budget", [BUDGET, SMALL], ids=["ample", "small"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_arrives_as_written_in_file_order(checkpoint, tensors, device, budget, own):
    wanted = targets(checkpoint, device, list(tensors)[::-1], own=own)
    assert_equal(arrivals(checkpoint, wanted, budget), tensors, checkpoint.tensors)


def test_a_selection(checkpoint, tensors):
    assert_equal(arrivals(checkpoint, targets(checkpoint, names=["wide", "bytes"])), tensors, ["bytes", "wide"])
    assert not list(stream(checkpoint, {}, BUDGET, Timings()))


def test_neighbours_come_together_and_side_by_side(tmp_path):
    """Except where another tensor lies between them, the alignment breaks or the run is full."""
    stored = {f"{i:02}": torch.full((4, 64), float(i)) for i in range(40)}  # 1 KiB each
    save_file({**stored, "10b": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    wanted = targets(checkpoint, names=[name for name in stored if name != "20"])
    runs = [
        [(piece.info.name, piece.tensor.data_ptr()) for piece in pieces]
        for pieces in stream(checkpoint, wanted, SMALL, Timings())
    ]
    sizes = [len(run) for run in runs]
    assert sum(sizes) == 39
    assert max(sizes) == 8
    assert len(runs) <= 8
    for run in runs:
        first = run[0][1]
        assert first % 16 == 0
        assert [address - first for _, address in run] == [1024 * position for position in range(len(run))]
        assert not {"10", "11"} <= {name for name, _ in run}
        assert not {"19", "21"} <= {name for name, _ in run}


def test_what_does_not_split_comes_whole(tmp_path):
    tensors = {"large": torch.randn(64, 1000), "small": torch.randn(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for splits, least in ((True, 20), (False, 1)):
        wanted = {name: Target(device=CPU, may_split=splits) for name in tensors}
        pieces = [p for run in stream(checkpoint, wanted, SMALL, Timings()) for p in run if p.info.name == "large"]
        assert len(pieces) == least if least == 1 else len(pieces) >= least
    assert_equal(arrivals(checkpoint, wanted, SMALL), tensors)


def test_pickles_are_read_like_any_file_and_views_of_them_come_last(tensors, tmp_path, monkeypatch):
    tensors["transposed"] = tensors["big"].t()
    torch.save(tensors, tmp_path / "weights.pt")
    checkpoint = Checkpoint.open(tmp_path / "weights.pt")
    read = []
    plain = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: read.extend(names) or plain(self, names))
    arrived = arrivals(checkpoint, targets(checkpoint))
    assert_equal(arrived, tensors)
    if sys.platform == "linux":
        assert set(read) == {"empty", "transposed"}
        assert list(arrived)[-1] == "transposed"


def test_legacy_pickles_come_as_views(tensors, tmp_path):
    torch.save(tensors, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    checkpoint = Checkpoint.open(tmp_path / "weights.pt")
    assert_equal(arrivals(checkpoint, targets(checkpoint)), tensors)


def test_no_more_is_lent_than_the_budget(tmp_path, monkeypatch):
    save_file({f"{i:03}": torch.full((2000,), float(i)) for i in range(40)}, tmp_path / "model.safetensors")
    alive = weakref.WeakSet()
    original = torch.empty

    def counting(*args, **kwargs):
        tensor = original(*args, **kwargs)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", counting)
    most = 0
    checkpoint = Checkpoint.open(tmp_path)
    for pieces in stream(checkpoint, targets(checkpoint), SMALL, Timings()):  # 8,000 bytes in 8 KiB: each a run
        for piece in pieces:
            assert torch.equal(piece.tensor, torch.full((2000,), float(int(piece.info.name))))
        most = max(most, len(alive))
        del pieces, piece
    assert most <= 4 + 2  # a budget of four, the consumer's, and one that a thread is done with


def test_room_lends_more(tmp_path):
    save_file({f"{i:03}": torch.full((2000,), float(i)) for i in range(40)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    asked = []
    arrived = arrivals(
        checkpoint, targets(checkpoint), SMALL, extra_nbytes=lambda device: asked.append(device) or 1 << 20
    )
    assert len(arrived) == 40
    assert set(asked) == {CPU}


def test_devices_take_turns(tmp_path):
    """Two queues: the runs of each come in file order, one of each in turn."""
    save_file({f"{i:03}": torch.full((2000,), float(i)) for i in range(12)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    other = torch.device("cpu", 0)  # as good as a second device to all but the memory
    wanted = {name: Target(device=CPU if int(name) < 6 else other) for name in checkpoint.tensors}
    order = [int(piece.info.name) for pieces in stream(checkpoint, wanted, SMALL, Timings()) for piece in pieces]
    assert order == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


def test_stages_count_every_byte(checkpoint):
    stages = Timings()
    for _ in stream(checkpoint, targets(checkpoint), BUDGET, stages):
        pass
    assert stages.totals["read"][1] == checkpoint.nbytes
    assert stages.totals["read"][0] > 0
    assert stages.totals["wait"][0] > 0


def truncate(checkpoint, tmp_path):
    os.truncate(checkpoint.files[0], 9000)


def remove(checkpoint, tmp_path):
    checkpoint.files[1].unlink()


def grow(checkpoint, tmp_path):
    with checkpoint.files[0].open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "damage, words", [(truncate, "changed after"), (remove, "cannot open"), (grow, "changed after")]
)
def test_damage_before_reading(checkpoint, tmp_path, damage, words):
    damage(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=words):
        list(stream(checkpoint, targets(checkpoint), BUDGET, Timings()))


def test_a_file_cut_short_while_it_is_read(checkpoint):
    reading = stream(checkpoint, targets(checkpoint), SMALL, Timings())
    next(reading)
    for file in checkpoint.files:
        os.truncate(file, 400)
    with pytest.raises(CheckpointError, match=r"ended at byte \d+, in the middle of tensor|changed after"):
        list(reading)


@pytest.mark.parametrize("end", ["error", "one thread", "abandoned", "interrupt"])
def test_threads_and_files_end_with_it(checkpoint, monkeypatch, end):
    before = set(threading.enumerate())
    files = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    reading = stream(checkpoint, targets(checkpoint), SMALL, Timings())
    next(reading)
    if end in ("error", "one thread"):
        preadv, broken = os.preadv, []

        def failing(*args):
            if end == "one thread" and broken not in ([], [threading.get_ident()]):
                return preadv(*args)
            broken[:] = [threading.get_ident()]
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError, match=r"cannot read tensor .*Input/output error"):
            list(reading)
    elif end == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            reading.throw(KeyboardInterrupt)
    del reading
    gc.collect()
    assert set(threading.enumerate()) <= before  # those of other tests may end meanwhile
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.parametrize("own", [False, True], ids=["lent", "own"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_stacked_tensors_arrive_as_one_split_or_whole(tmp_path, device, own):
    """37 tensors of 4,440 bytes in no order, 8 KiB at a time: a piece is a whole member, in chunks of 2.7 kB."""
    stored = {f"{i}": torch.randn(30, 37) for i in range(37)}
    save_file(stored, tmp_path / "model.safetensors")
    members = [f"{i * 7 % 37}" for i in range(37)]
    source = stacked(Checkpoint.open(tmp_path), {"all": members})
    assert len(source.tensors["all"].spans) > 30
    expected = {"all": torch.stack([stored[name] for name in members])}
    for budget in (SMALL, BUDGET):
        assert_equal(arrivals(source, targets(source, device, own=own), budget), expected, ["all"])


def test_a_model_in_memory_comes_as_its_own_tensors():
    model = torch.nn.Linear(3, 4)
    source = ModelTensors(model)
    pieces = [piece for pieces in stream(source, targets(source), BUDGET, Timings()) for piece in pieces]
    assert [(piece.info.name, piece.start) for piece in pieces] == [("weight", 0), ("bias", 0)]
    assert [piece.tensor.data_ptr() for piece in pieces] == [model.weight.data_ptr(), model.bias.data_ptr()]


def test_two_threads_stream_one_checkpoint_at_once(checkpoint, tensors):
    with ThreadPoolExecutor(4) as pool:
        for arrived in pool.map(lambda _: arrivals(checkpoint, targets(checkpoint), SMALL), range(24)):
            assert_equal(arrived, tensors, checkpoint.tensors)
    assert not open_files(checkpoint)


def open_files(checkpoint):
    if sys.platform != "linux":
        return []
    links = [os.path.join("/proc/self/fd", descriptor) for descriptor in os.listdir("/proc/self/fd")]
    targets_of_links = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [path for path in targets_of_links if path in set(map(str, checkpoint.files))]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what is open in /proc")
def test_a_checkpoint_may_have_more_files_than_a_process_may_open(tmp_path):
    import resource  # of POSIX

    files = {f"w{i:03}": tmp_path / f"model-{i:05}-of-00300.safetensors" for i in range(1, 301)}
    tensors = {name: torch.randn(3) for name in files}
    for name, path in files.items():
        save_file({name: tensors[name]}, path)
    checkpoint = Checkpoint.open_files(list(files.values()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, limits[1]))
    try:
        assert_equal(arrivals(checkpoint, targets(checkpoint)), tensors, checkpoint.tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class InjectedError(Exception):
    """An error that nothing but these tests raises."""


@pytest.mark.parametrize("error", [InjectedError("broken"), KeyboardInterrupt(), CheckpointError("timeout")], ids=repr)
def test_what_a_read_raises_in_a_thread_is_raised_in_the_caller(checkpoint, error):
    """The same object, after what was read before it, with every source closed and no thread left."""
    before, wrapped = set(threading.enumerate()), []

    def wrap(source):
        offset = checkpoint.tensors["big"].spans[0].offset + 900_000
        fails = source is checkpoint.tensors["big"].spans[0].source
        wrapped.append(FaultyBytes(source, fail_at=offset, error=error) if fails else FaultyBytes(source))
        return wrapped[-1]

    reading = stream(with_bytes(checkpoint, wrap), targets(checkpoint), SMALL, Timings())
    arrived = [next(reading) for _ in range(20)]
    with pytest.raises(type(error)) as caught:
        deque(reading, maxlen=0)
    assert caught.value is error
    assert len(arrived) == 20
    assert set(threading.enumerate()) <= before
    assert [source.closes for source in wrapped if source.reads] == [1]
    assert not open_files(checkpoint)


def test_an_error_in_a_thread_keeps_no_staging_memory_once_it_is_handled(checkpoint, monkeypatch):
    """Pinned memory and memory of a GPU are freed with the error, and not when the collector comes."""
    movers, make = [], bigq.loading.stream._Mover

    def noted(*args):
        mover = make(*args)
        movers.append(weakref.ref(mover))
        return mover

    monkeypatch.setattr(bigq.loading.stream, "_Mover", noted)
    span = checkpoint.tensors["half"].spans[0]
    source = with_bytes(checkpoint, lambda s: FaultyBytes(s, fail_at=span.offset) if s is span.source else s)
    gc.collect()
    gc.disable()
    try:
        with suppress(CheckpointError):
            list(stream(source, targets(checkpoint), BUDGET, Timings()))
        kept = [mover for mover in movers if mover() is not None]
    finally:
        gc.enable()
    assert len(movers) == BUDGET.threads
    assert not kept


def test_an_error_names_the_tensor_that_the_byte_belongs_to(checkpoint):
    for name in ("half", "bytes", "wide", "long"):
        span = checkpoint.tensors[name].spans[0]
        for faults, words in (
            ({"fail_at": span.offset}, rf"cannot read tensor '{name}' of .*safetensors: a fault that a test asked for"),
            (
                {"short_after": span.offset + 1},
                rf"safetensors ended at byte {span.offset + 1}, in the middle of tensor '{name}': it was cut short",
            ),
        ):
            late = {"delay_s": 0.02, "delay_at": span.offset}  # so that threads which read on fail before it
            faulty = partial(FaultyBytes, **faults, **late)
            source = with_bytes(checkpoint, lambda s: faulty(s) if s is span.source else s)  # noqa: B023
            for budget in (BUDGET, SMALL):
                with pytest.raises(CheckpointError, match=words):
                    list(stream(source, targets(checkpoint), budget, Timings()))
    assert not open_files(checkpoint)


def test_an_error_in_a_later_span_names_the_stack(tmp_path):
    save_file({name: torch.randn(8, 8) for name in "abcd"}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    offset = checkpoint.tensors["c"].spans[0].offset
    source = with_bytes(checkpoint, lambda source: FaultyBytes(source, fail_at=offset))
    adapted = stacked(source, {"stack": ["d", "a", "c"]})
    assert len(list(stream(adapted, targets(adapted, names=["b"]), BUDGET, Timings()))) == 1
    with pytest.raises(CheckpointError, match=r"cannot read tensor 'stack' of .*model\.safetensors"):
        list(stream(adapted, targets(adapted), BUDGET, Timings()))


def test_slow_reads_that_end_out_of_order_come_in_order(checkpoint, tensors):
    source = with_bytes(
        checkpoint, lambda s: FaultyBytes(s, delay_s=0.05, delay_at=checkpoint.tensors["big"].spans[0].offset)
    )
    assert_equal(arrivals(source, targets(checkpoint), SMALL), tensors, checkpoint.tensors)


def test_every_byte_is_read_once(checkpoint):
    wrapped = []

    def wrap(source):
        wrapped.append(FaultyBytes(source))
        return wrapped[-1]

    for _ in stream(with_bytes(checkpoint, wrap), targets(checkpoint), SMALL, Timings()):
        pass
    read = [(id(source), byte) for source in wrapped for asked in source.reads for byte in asked]
    assert len(read) == len(set(read)) == checkpoint.nbytes


def test_a_file_is_checked_before_memory_is_made_for_what_it_holds(checkpoint, monkeypatch):
    """By `bigq.loading.stream.open_unchanged`, in the thread of the caller."""
    checked, plain, made = [], bigq.loading.stream.open_unchanged, []

    def swapped(path, nbytes, identity):
        checked.append((path, threading.current_thread()))
        if path == checkpoint.files[1]:
            os.truncate(path, nbytes - 1)
        return plain(path, nbytes, identity)

    def memory(name):
        made.append(name)
        return torch.empty(checkpoint.tensors[name].shape, dtype=checkpoint.tensors[name].dtype)

    monkeypatch.setattr(bigq.loading.stream, "open_unchanged", swapped)
    wanted = {name: Target(device=CPU, allocate=partial(memory, name)) for name in checkpoint.tensors}
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors changed after it was opened"):
        list(stream(checkpoint, wanted, BUDGET, Timings()))
    assert checked == [(path, threading.current_thread()) for path in checkpoint.files]
    assert made
    assert {checkpoint.tensors[name].where for name in made} == {str(checkpoint.files[0])}


@pytest.mark.parametrize("threads, nbytes", [(0, None), (1.5, None), (None, 1000), ("2", None)], ids=repr)
def test_budgets_that_are_none(threads, nbytes):
    with pytest.raises(ConfigError, match=r"read_threads is|read_budget is"):
        Budget.of_machine(threads, nbytes)


def test_the_budget_of_the_machine(monkeypatch):
    monkeypatch.setattr("bigq.loading.stream.usable_cores", lambda: 64)
    monkeypatch.setattr("bigq.loading.stream.usable_memory_nbytes", lambda: 1 << 40)
    assert Budget.of_machine(None, None) == Budget(threads=12, nbytes=768 << 20)
    monkeypatch.setattr("bigq.loading.stream.usable_cores", lambda: 2)
    monkeypatch.setattr("bigq.loading.stream.usable_memory_nbytes", lambda: 1 << 30)
    assert Budget.of_machine(None, None) == Budget(threads=2, nbytes=128 << 20)
    for budget in (Budget.of_machine(16, 1 << 20), Budget.of_machine(8, 512 << 20), SMALL):
        assert 2 * budget.threads * budget.chunk_nbytes <= max(budget.nbytes // 2, 8192 * budget.threads)
        assert 4 * budget.run_nbytes <= budget.nbytes


def test_processes_of_a_job_share_the_machine(monkeypatch):
    monkeypatch.setattr("bigq.loading.stream.usable_cores", lambda: 64)
    monkeypatch.setattr("bigq.loading.stream.usable_memory_nbytes", lambda: 16 << 30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Budget.of_machine(None, None) == Budget(threads=8, nbytes=256 << 20)
    assert Budget.of_machine(12, 1 << 30) == Budget(threads=12, nbytes=1 << 30)
    monkeypatch.setattr("bigq.loading.stream.usable_cores", lambda: 4)
    assert Budget.of_machine(None, None).threads == 1


@pytest.mark.parametrize("ends", ["whole", "early", "error"])
def test_the_interpreter_gets_its_switch_interval_back(ends, checkpoint):
    gc.collect()  # an error of a test before may hold the stream that it ended
    before = sys.getswitchinterval()
    pieces = stream(checkpoint, targets(checkpoint), BUDGET, Timings())
    next(pieces)
    assert sys.getswitchinterval() < before
    if ends == "whole":
        deque(pieces, maxlen=0)
    elif ends == "early":
        pieces.close()
    else:
        with pytest.raises(ZeroDivisionError):
            pieces.throw(ZeroDivisionError)
    assert sys.getswitchinterval() == before


def test_a_shorter_switch_interval_is_left_alone(checkpoint):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        pieces = stream(checkpoint, targets(checkpoint), BUDGET, Timings())
        next(pieces)
        assert sys.getswitchinterval() == pytest.approx(1e-4)
        pieces.close()
        assert sys.getswitchinterval() == pytest.approx(1e-4)
    finally:
        sys.setswitchinterval(before)
