"""stream: codes and their scales go to a GPU through staging memory, as floats do, and become numbers there."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bigq.loading.stream
from bigq import CheckpointError
from bigq.checkpoint import Adapter, Checkpoint, LocalFile, with_scaled
from bigq.loading.runs import Run, Target
from bigq.loading.stream import Budget, stream
from bigq.loading.timings import Timings
from bigq.testing import FaultyBytes, with_bytes
from scaled_checkpoints import e2m1_numbers, in_fp8, numbers, write
from sources import stacked

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BUDGET = Budget(threads=3, nbytes=1 << 20)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture
def link(monkeypatch):
    """What crosses a link to a GPU that is not there: bytes by the thread that has read them, and events in order."""
    seen = SimpleNamespace(nbytes=0, events=[], lock=threading.Lock())

    class ToGPU:
        def __init__(self, device):
            self.device, self.stream = device, object()

        def depart(self):
            seen.events.append("depart")

        def arrive(self):
            seen.events.append("arrive")

    class Staged:
        def __init__(self, nbytes):
            self.memory = bytearray(nbytes)
            self.bytes = memoryview(self.memory)

        def copy_to(self, memory, link):
            assert isinstance(link, ToGPU)
            with seen.lock:
                seen.nbytes += len(memory)
            memory.copy_(torch.frombuffer(self.memory, dtype=torch.uint8, count=len(memory)))

        def wait(self):
            pass

    empty = torch.empty

    def on_cpu(*args, device=CPU, **kwargs):
        return empty(*args, device=CPU if torch.device(device) == GPU else device, **kwargs)

    monkeypatch.setattr(torch, "empty", on_cpu)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(bigq.loading.stream, "Link", ToGPU)
    monkeypatch.setattr(bigq.loading.stream, "StagingBuffer", Staged)
    return seen


def to_gpu(source):
    return dict.fromkeys(source.tensors, Target(device=GPU))


def arrivals(source, budget=BUDGET, timings=None):
    arrived = {}
    for pieces in stream(source, to_gpu(source), budget, timings or Timings()):
        for piece in pieces:
            arrived.setdefault(piece.info.name, []).append(piece.tensor.clone())
    return {name: torch.cat(tensors) for name, tensors in arrived.items()}


@pytest.fixture
def checkpoint(tmp_path):
    """Tensors of FP8, MXFP4 and floats, in codes; and the numbers that they are."""
    blocks = torch.randint(0, 256, (8, 100, 16, 16), dtype=torch.uint8)
    exponents = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8)
    large, small, norm = torch.randn(3000, 512), torch.randn(200, 300), torch.randn(300).bfloat16()
    (large, of_large), (small, of_small) = in_fp8(large, (128, 128)), in_fp8(small, (128, 128))
    tensors = {"stack_blocks": blocks, "stack_scales": exponents, "norm": norm}
    tensors |= {"large": large, "large_scale_inv": of_large, "small": small, "small_scale_inv": of_small}
    expected = {"stack": e2m1_numbers(blocks.flatten(-2), exponents).mT, "norm": norm}
    expected |= {"large": numbers(large, of_large, (128, 128)), "small": numbers(small, of_small, (128, 128))}
    folder = write(tmp_path / "codes", tensors, FP8)
    return with_scaled(Checkpoint.open(folder), folder), tensors, expected


def test_codes_and_scales_cross_the_link_in_staging_memory(checkpoint, link, monkeypatch):
    """The calling thread reads nothing: a copy of its own would wait for all copies that are queued before it."""
    source, tensors, expected = checkpoint
    readers, read_into, timings = set(), LocalFile.read_into, Timings()

    def noted(*args):
        readers.add(threading.current_thread())
        return read_into(*args)

    monkeypatch.setattr(LocalFile, "read_into", noted)
    arrived = arrivals(source, timings=timings)
    assert arrived.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(arrived[name], tensor), name
    assert readers
    assert threading.current_thread() not in readers
    assert link.nbytes == sum(tensor.nbytes for tensor in tensors.values()), "each byte crosses once"
    assert timings.totals["read"][1] == timings.totals["copy"][1] == link.nbytes
    decoded = [name for name in expected if name != "norm"]
    assert timings.totals["decode"][1] == sum(expected[name].nbytes for name in decoded)
    assert link.events.count("arrive") == link.events.count("depart")


@pytest.mark.parametrize("device", [CPU, GPU], ids=["to the CPU", "to a GPU"])
def test_a_scale_that_cannot_be_read_is_named(tmp_path, link, device):
    """The second of three scales, which are read as one range of the file."""
    tensors = {}
    for name in "abc":
        codes, scales = in_fp8(torch.randn(256, 256), (128, 128))
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}
    plain = Checkpoint.open(write(tmp_path, tensors, FP8))
    offset = plain.tensors["b.weight_scale_inv"].spans[0].offset
    source = with_scaled(with_bytes(plain, lambda s: FaultyBytes(s, fail_at=offset + 4)), tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read tensor 'b\.weight_scale_inv' of .*model\.safetensors"):
        list(stream(source, dict.fromkeys(source.tensors, Target(device=device)), BUDGET, Timings()))


def test_scales_of_a_stack_of_experts_are_read_together(tmp_path, link):
    """64 experts: their codes are one range of the file, and so are their scales."""
    codes, scales = in_fp8(torch.randn(64, 32, 64), (32, 32))
    tensors = {f"{i:02}": expert for i, expert in enumerate(codes)}
    tensors |= {f"{i:02}_scale_inv": own for i, own in enumerate(scales)}
    said, reads = {"quant_method": "fp8", "weight_block_size": [32, 32]}, []
    plain = with_bytes(
        Checkpoint.open(write(tmp_path, tensors, said)), lambda s: reads.append(FaultyBytes(s)) or reads[-1]
    )
    source = stacked(with_scaled(plain, tmp_path), {"stack": [f"{i:02}" for i in range(64)]})
    assert torch.equal(arrivals(source)["stack"], numbers(codes, scales, (32, 32)))
    (file,) = reads
    chunks = -(-codes.nbytes // BUDGET.chunk_nbytes)
    assert len(file.reads) <= chunks + 2, "a range for each chunk, and one of scales for each of the two runs"


def test_scales_in_no_plain_bytes_are_read_by_the_caller(checkpoint, link):
    source, _, expected = checkpoint

    class Without(Adapter):
        """The scales as they are in a legacy pickle."""

        def __init__(self, source):
            super().__init__(source)
            self.read = source.read
            self.tensors = {
                name: replace(stored, spans=()) if "_scale" in name else stored
                for name, stored in source.tensors.items()
            }

    arrived = arrivals(with_scaled(Without(source._source), source._source.files[0].parent))
    assert arrived.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(arrived[name], tensor), name


def test_only_one_run_at_a_time_has_room_for_its_numbers(tmp_path, link, monkeypatch):
    """So that codes of 4 bits keep as many threads busy as floats do, within the same budget."""
    blocks = torch.randint(0, 256, (60, 100, 16, 16), dtype=torch.uint8)
    write(tmp_path, {"w_blocks": blocks, "w_scales": torch.full(blocks.shape[:-1], 120, dtype=torch.uint8)})
    source, started, most, at_first = with_scaled(Checkpoint.open(tmp_path), tmp_path), [], 0, 0
    start = Run.start
    monkeypatch.setattr(Run, "start", lambda run, nbytes: started.append(run) or start(run, nbytes))
    for taken, pieces in enumerate(stream(source, to_gpu(source), BUDGET, Timings())):
        at_first = at_first or len(started)
        codes = sum(run.temporary_nbytes for run in started[taken:])
        most = max(most, codes + sum(piece.tensor.nbytes for piece in pieces))
    assert at_first >= 8, "with room for the numbers of each there were three"
    assert most <= BUDGET.nbytes
