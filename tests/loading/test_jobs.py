"""Jobs: what a WeightJob lends of the memory that a quantized weight will take, and where finished tensors go."""

import gc

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import NF4, QuantizationConfig, load_and_quantize_model
from bigq.checkpoint import StoredTensor
from bigq.formats import Description, TensorSpec
from bigq.loading.destinations import Destinations
from bigq.loading.jobs import Batch, TensorJob, WeightJob
from bigq.loading.runs import Piece
from bigq.planning.plan import PlannedTensor, PlannedWeight

MIB = 1 << 20


def job(shape, place="cuda:0"):
    description = Description(format=NF4(), shape=shape, dtype=torch.bfloat16)
    planned = PlannedWeight(
        names=("w",), refs=(), description=description, source="w", method="absmax", importance=None
    )
    runs_on = torch.device("cuda:0")
    return WeightJob(planned, Destinations(places={"w": place}, runs_on=runs_on, spaces={}, in_checkpoint={}), Batch())


@pytest.mark.parametrize(
    "shape, run_nbytes, is_lent",
    [
        ((2048, 2048), 128 * MIB, True),
        ((1024, 2048), 128 * MIB, False),  # packed in 1 MiB, which torch takes from another pool
        ((64, 2048, 2048), 128 * MIB, True),  # packed in as much as a run
        ((65, 2048, 2048), 128 * MIB, False),
        ((2048, 2048), 2 * MIB, True),
        ((2048, 2048), 1 * MIB, False),
    ],
    ids=str,
)
def test_what_is_lent_fits_into_the_memory_of_a_run(shape, run_nbytes, is_lent):
    made = job(shape)
    assert made.lent_nbytes(run_nbytes) == (made.planned.nbytes if is_lent else 0)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_nothing_is_lent_of_what_is_stored_elsewhere(place):
    assert not job((2048, 2048), place).lent_nbytes(128 * MIB)


@pytest.mark.parametrize("is_temporary", [True, False], ids=["in-a-run", "in-its-own-memory"])
def test_a_kept_tensor_is_moved_once_it_is_whole(is_temporary):
    """Not one that arrives in pieces, of which none is known to be the last."""
    moved = []

    def move(name, tensor):
        moved.append((name, tensor.clone()))
        return moved[-1][1]

    numbers = torch.arange(4.0)
    spec = TensorSpec(shape=(4,), dtype=torch.float32)
    planned = PlannedTensor(names=("t",), source="t", spec=spec, is_buffer=False, requires_grad=False)
    runs_on = torch.device("cpu")
    places = Destinations(places={"t": "cpu"}, runs_on=runs_on, spaces={}, in_checkpoint={}, moved=move)
    made = TensorJob(planned, places)
    info = StoredTensor(name="t", shape=torch.Size([4]), dtype=torch.float32, where="here")
    made.take(Piece(info, 0, numbers, is_temporary=is_temporary))
    placed = made.take_placed()["t"]
    assert torch.equal(placed, numbers)
    assert [(name, tensor is placed) for name, tensor in moved] == ([] if is_temporary else [("t", True)])


class Stacks(nn.Module):
    """A model with two sizes of stacks: one is packed in more than a run of the test has, and one in less."""

    def __init__(self):
        super().__init__()
        self.large = nn.ParameterList(nn.Parameter(torch.empty(48, 1024, 1024, dtype=torch.bfloat16)) for _ in range(5))
        self.small = nn.ParameterList(nn.Parameter(torch.empty(24, 1024, 1024, dtype=torch.bfloat16)) for _ in range(5))


@pytest.mark.gpu
def test_a_load_of_stacks_reserves_little_more_than_its_peak(tmp_path):
    """1.5 times as much where all results are lent: stacks of 24 MiB do not fit into what runs of 16 MiB leave."""
    with torch.device("meta"):
        model = Stacks()
    state = {
        name: torch.randn(own.shape, dtype=own.dtype, device="cuda").cpu() for name, own in model.named_parameters()
    }
    save_file(state, tmp_path / "model.safetensors")
    config = QuantizationConfig("nf4", also_quantize=["large.*", "small.*"])
    gc.collect()
    torch.cuda.empty_cache()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    load_and_quantize_model(model, tmp_path, config, 0, read_budget=64 * MIB, progress=False)
    peak = torch.cuda.max_memory_allocated() - held
    assert torch.cuda.max_memory_reserved() - reserved < 1.1 * peak + 20 * MIB, "and a segment of small tensors"
