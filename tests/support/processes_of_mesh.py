"""A model for loads into shards, whose weights no number of processes divides."""

import torch
from accelerate import init_empty_weights
from torch import nn

from bigq import load_and_quantize_model
from ranks import error_of, mesh_of, own_device, run_ranks

__all__ = [
    "IDS",
    "STACKS",
    "Net",
    "empty_net",
    "error_of",
    "held_by_all",
    "load_net",
    "mesh_of",
    "own_device",
    "run_ranks",
]

STACKS = ["experts.up", "experts.down"]  # of Net; no module that is quantized by default
IDS = torch.arange(14).view(2, 7)  # an input of Net


class Block(nn.Module):
    """Linears of 513 rows, of 64, of 2 and of 1, and a buffer."""

    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 513), nn.Linear(513, width, bias=False)
        self.two, self.one = nn.Linear(width, 2), nn.Linear(width, 1)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y))) + self.two(y).sum(-1, keepdim=True) * self.one(y) * self.scale[0]


class Experts(nn.Module):
    """Two stacks of 5 weights."""

    def __init__(self, count=5, width=64):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, 70, width) * 0.1)
        self.down = nn.Parameter(torch.randn(count, width, 70) * 0.1)

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + torch.relu(x @ up.T) @ down.T
        return x


class Net(nn.Module):
    """Blocks between an embedding and an output head that are tied, with buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(101, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.experts = Experts()
        self.head = nn.Linear(64, 101, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 64))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mask", torch.linspace(1, 2, 64), persistent=False)

    def forward(self, ids):
        x = self.embed(ids) * self.gain * self.mask.to(self.gain.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.experts(x))


def empty_net():
    """A Net on meta, its buffers real."""
    with init_empty_weights():
        return Net()


def load_net(folder, config, **arguments):
    """A Net, loaded from `folder`."""
    return load_and_quantize_model(empty_net(), folder, config, progress=False, **arguments)


def held_by_all(model):
    """The state of a sharded model, each tensor put together from all processes, where their groups can do so."""
    return {
        name: t.to(t.device_mesh.device_type).full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in model.state_dict().items()
    }
