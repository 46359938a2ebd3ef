"""A load of a checkpoint into slices: each process reads some rows, and holds what a cut of the whole model holds."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model
from ranks import mesh_of, own_device, run_ranks

FORMATS = {"nf4": NF4(), "nf4-double-quant": NF4(double_quant=True), "int8": Int8()}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 258), nn.Linear(258, 64)
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)
        self.whole = nn.Linear(64, 65)  # not in the plan

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.whole(x + self.narrow(torch.relu(self.wide(x))))[..., :64]


def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(64, 10))


def _load(rank, folder):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from bigq.integrations.sharded_rows import shard_rows
    from bigq.integrations.tensor_parallel import parallelize_module

    mesh, found = mesh_of(2), {}
    plan = {
        **{f"*.{name}": ColwiseParallel() for name in ("up", "wide")},
        **{f"*.{name}": RowwiseParallel() for name in ("down", "narrow")},
    }
    x = torch.linspace(-1, 1, 3 * 64).view(3, 64).to(own_device())
    for name, weight_format in FORMATS.items():
        config = QuantizationConfig(weight_format)
        with torch.device("meta"):
            skeletons = [build() for _ in range(2)]
        cut = parallelize_module(load_and_quantize_model(skeletons[0], folder, config, own_device()), mesh, plan)

        def shard(model):
            return shard_rows(model, mesh)

        loaded = load_and_quantize_model(skeletons[1], folder, config, mesh=mesh, shard=shard)
        held = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in loaded.parameters())
        parallelize_module(loaded, mesh, plan)
        states = [dict(model.named_parameters()) for model in (cut, loaded)]
        nbytes = sum(p.nbytes for p in states[0].values())
        same = states[0].keys() == states[1].keys() and all(torch.equal(p, states[1][n]) for n, p in states[0].items())
        gradients = []
        for model in (cut, loaded):
            given = x.clone().requires_grad_()
            out = model(given)
            out.sum().backward()
            gradients += [out, given.grad]
        found[name] = (
            same,
            torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3]),
            held / nbytes,
        )
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    save_file(build().state_dict(), folder / "model.safetensors")
    return run_ranks(_load, folder, str(folder), gpus=True)


@pytest.mark.parametrize("name", FORMATS)
def test_slices_are_those_of_a_model_that_was_loaded_whole(loaded, name):
    for found in loaded:
        same_tensors, same_numbers, share = found[name]
        assert same_tensors
        assert same_numbers
        assert share < 1.1  # before the plan is carried out, no process holds more than after
