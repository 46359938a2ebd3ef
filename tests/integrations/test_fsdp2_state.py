"""What a model in shards saves and loads: checkpoints of torch.distributed, gathered states, folders of bigq."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from bigq import (
    NF4,
    Int8,
    QuantizationConfig,
    load_and_quantize_model,
    memory_footprint,
    num_parameters,
    save_quantized,
)
from ranks import error_of, run_ranks

FORMATS = {"nf4": NF4(), "nf4-double-quant": NF4(double_quant=True, block_size=32), "int8": Int8()}
X = torch.linspace(-2, 2, 3 * 64).view(3, 64)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 101), nn.Linear(101, 64, bias=False)  # 101 rows in halves and thirds
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def _model(own, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(_Block(), _Block(), nn.Linear(64, 10))
    return load_and_quantize_model(model, None, QuantizationConfig(own), "cpu")


def _sharded(own, mesh, seed=0):
    from torch.distributed.fsdp import fully_shard

    model = _model(own, seed)
    for block in model[:2]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _same(model, other):
    """Whether the tensors of two models, of which one may be in shards, are equal, and so what they compute."""
    expected = dict(other.named_parameters())
    whole = {name: p.full_tensor() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
    same = [torch.equal(tensor, expected[name]) for name, tensor in whole.items()]
    return all(same) and torch.equal(model(X), other(X))


def _load(model, folder):
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)


def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def _save(rank, folder):
    mesh, found = _mesh(), {}
    for name, own in FORMATS.items():
        whole, model = _model(own), _sharded(own, mesh)
        dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/{name}")
        other = _sharded(own, mesh, seed=1)
        _load(other, f"{folder}/{name}")
        found[name, "same mesh"] = _same(other, whole)

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        found[name, "keys"] = state.keys() == (whole.state_dict().keys() if rank == 0 else set())
        other = _sharded(own, mesh, seed=1)
        set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        found[name, "from the first rank"] = _same(other, whole)

        before = dict(model.named_parameters())
        save_quantized(model, f"{folder}/{name}-folder", layout="bigq")
        after = dict(model.named_parameters())
        found[name, "unchanged"] = all(after[key] is tensor for key, tensor in before.items())
        with torch.device("meta"):
            skeleton = nn.Sequential(_Block(), _Block(), nn.Linear(64, 10))
        found[name, "folder"] = _same(load_and_quantize_model(skeleton, f"{folder}/{name}-folder", None, "cpu"), whole)

        found[name, "bytes"] = memory_footprint(model).total_nbytes
        found[name, "numbers"] = num_parameters(model), num_parameters(whole)
        quantized, reference = model[0].up, whole[0].up
        dense = quantized.dequantize()
        found[name, "dequantize"] = torch.equal(dense.full_tensor(), reference.dequantize())
        found[name, "local rows"] = tuple(dense.to_local().shape)
        found[name, "scales"] = torch.equal(quantized.absmax.full_tensor(), reference.absmax)
        halves = quantized.weight.to(torch.float16)
        found[name, "copy"] = torch.equal(halves.dequantize().full_tensor(), reference.weight.half().dequantize())
        total = quantized.weight.square().sum().full_tensor()
        found[name, "sum"] = (total / reference.weight.square().sum() - 1).abs().item()
        new = torch.randn(101, 64)
        found[name, "refused"] = error_of(lambda module=quantized: module.weight[3:5].zero_())
        with torch.no_grad():
            quantized.weight.copy_(_as_shards(new, mesh))
            reference.weight.copy_(new)
        found[name, "written"] = _same(model, whole)
    found["bitsandbytes"] = _bitsandbytes(mesh, folder)
    found["lost"], found["kept"] = _written_while_gathered(mesh, folder)
    found["a rank's own error"] = error_of(lambda: save_quantized(_sharded(NF4(), mesh), f"{folder}/nf4/.metadata"))
    return found


def _written_while_gathered(mesh, folder):
    """What a write says after a call, which leaves the root whole; and whether one holds after a save, in shards."""
    from torch.distributed.fsdp import fully_shard

    model, one = fully_shard(_model(NF4()), mesh=mesh), _model(NF4())
    with torch.no_grad():
        model(X)
    said = error_of(lambda: model[0].up.weight.mul_(2)), error_of(lambda: setattr(model[0].up, "weight", X))
    save_quantized(model, f"{folder}/after-a-call")
    for each in (model, one):
        each[0].up.weight.mul_(2)
    return said, _same(model, one)


def _as_shards(tensor, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, mesh, [Shard(0)])


def _bitsandbytes(mesh, folder):
    """Whether a folder in the layout of bitsandbytes is the one that one process writes; None where none is read."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 10)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole, model = (load_and_quantize_model(own, None, QuantizationConfig("nf4"), "cpu") for own in models)
    from torch.distributed.fsdp import fully_shard

    save_quantized(fully_shard(model, mesh=mesh), f"{folder}/bnb", layout="bitsandbytes")
    if torch.distributed.get_rank() == 0:
        save_quantized(whole, f"{folder}/bnb-whole", layout="bitsandbytes")
        states = [load_file(f"{folder}/{name}/model.safetensors") for name in ("bnb", "bnb-whole")]
        return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    return None


def _load_three(rank, folder):
    """A checkpoint of one process in the shards of three."""
    mesh, found = _mesh(), {}
    for name, own in FORMATS.items():
        other = _sharded(own, mesh, seed=1)
        _load(other, f"{folder}/{name}-one")
        found[name] = _same(other, _model(own)), tuple(other[0].up.weight_packed.to_local().shape)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def saved(folder):
    return run_ranks(_save, folder, str(folder))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "what",
    [
        "same mesh", "keys", "from the first rank", "unchanged", "folder", "dequantize", "scales", "copy", "written",
    ],
)  # fmt: skip
def test_shards_are_saved_loaded_read_and_written_as_one_process_does_it(saved, name, what):
    assert [found[name, what] for found in saved] == [True, True]


@pytest.mark.parametrize("name", FORMATS)
def test_each_process_counts_its_own_bytes_and_all_numbers(saved, name):
    whole = _model(FORMATS[name])
    total = memory_footprint(whole).total_nbytes
    assert sum(found[name, "bytes"] for found in saved) == total
    assert abs(saved[0][name, "bytes"] / total - 0.5) < 0.02
    for found in saved:
        assert len(set(found[name, "numbers"])) == 1
        assert found[name, "sum"] < 1e-6
        assert "a part or a view of a sharded quantized weight" in found[name, "refused"]
    assert [found[name, "local rows"] for found in saved] == [(51, 64), (50, 64)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_is_loaded_in_one(saved, folder, name):
    model = _model(FORMATS[name], seed=1)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / name, no_dist=True)
    model.load_state_dict(state)
    assert _same(model, _model(FORMATS[name]))


@pytest.mark.slow  # 20 s of CPU time
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_one_process_is_loaded_in_three(folder):
    for name, own in FORMATS.items():
        dcp.save(_model(own).state_dict(), checkpoint_id=folder / f"{name}-one", no_dist=True)
    for rank, found in enumerate(run_ranks(_load_three, folder, str(folder), world=3)):
        for name in FORMATS:
            same, shape = found[name]
            assert same, name
            assert shape == ((34 if rank < 2 else 33), 32 if "nf4" in name else 64)


def test_a_write_that_fsdp_would_drop_is_refused(saved):
    for found in saved:
        assert found["kept"]
        for said in found["lost"]:
            assert said.startswith("UnsupportedError: a weight of QuantizedLinear is written while it is gathered")


def test_other_layouts_are_saved_from_shards(saved):
    assert [found["bitsandbytes"] for found in saved] == [True, None]


def test_an_error_of_the_process_that_writes_leaves_no_other_waiting(saved):
    assert ["FileExistsError" in found["a rank's own error"] for found in saved] == [True, False]
