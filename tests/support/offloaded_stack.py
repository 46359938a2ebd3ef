"""A stack of layers that are offloaded, each a block of one Prefetcher."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from bigq.formats import TensorSpec
from bigq.offload.attach import attach
from bigq.offload.block import OffloadedBlock
from bigq.offload.hooks import PlacementHook
from bigq.offload.prefetch import Prefetcher
from bigq.offload.space import OffloadSpace

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH = 16


class Layer(nn.Module):
    """A linear and a norm; keeps the addresses of what it was lent."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen = []

    def forward(self, x, fail=False, then=None):
        self.seen.append(self.up.weight.data_ptr())
        if fail:
            raise ValueError("on purpose")
        x = x + torch.tanh(self.up(self.norm(x)))
        return x if then is None else then(x)


class Stack(nn.Module):
    def __init__(self, count=5):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x, order=None, checkpointing=None):
        for i in order if order is not None else range(len(self.layers)):
            layer = self.layers[i]
            x = layer(x) if checkpointing is None else checkpointed(layer, x, use_reentrant=checkpointing)
        return x


def offload(model, folder, device="cpu", place="disk", blocks=None, slots=2):
    """Move the tensors of each of `blocks` to a file or to pinned memory and hook it; returns the Prefetcher."""
    device = torch.device(device)
    blocks = list(model.layers) if blocks is None else blocks
    named = {f"{i}.{name}": p for i, block in enumerate(blocks) for name, p in block.named_parameters()}
    specs = {name: TensorSpec(shape=tuple(p.shape), dtype=p.dtype) for name, p in named.items()}
    space = OffloadSpace.in_file(folder, specs) if place == "disk" else OffloadSpace.pinned(specs)
    prefetcher = Prefetcher(device, slots=slots)
    for i, block in enumerate(blocks):
        borrowed = [(owner, leaf) for owner in block.modules() for leaf in owner._parameters]
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(False)
            parameter.data = space.empty(f"{i}.{name}").copy_(parameter.data)
        lent = OffloadedBlock(borrowed, ahead=True)
        prefetcher.add(lent)
        attach(block, PlacementHook(device, block=lent, prefetcher=prefetcher))
    return prefetcher


def prefetcher_of(model):
    return model.layers[0]._hf_hook.prefetcher


def input_on(device):
    return torch.randn(3, WIDTH, device=device)
