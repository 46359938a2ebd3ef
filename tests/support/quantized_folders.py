"""Folders of quantized weights: a model to write them of, and the comparison of two."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from bigq import load_and_quantize_model, save_quantized


class Wide(nn.Module):
    """An embedding and linears of more than 256 KB, tensors that are kept, and buffers; `tied` or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 256)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(256, 320), nn.Linear(320, 256)) for _ in range(3))
        self.head = nn.Linear(256, 300, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.ones(3), persistent=False)


def skeleton(**settings: bool) -> Wide:
    """A Wide on meta, its buffers real."""
    with init_empty_weights():
        return Wide(**settings)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files in a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        assert not held.keys() & found.keys(), "a tensor lies in two files"
        found |= held
    assert found, f"{folder} holds no tensors"
    return found


def assert_same(folder: Path, other: Path) -> None:
    """Both folders hold the same tensors, bit for bit, however they are divided among files."""
    found, expected = read_folder(folder), read_folder(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def load_and_save(
    model: nn.Module, source: Path, config: object, folder: Path, layout: str = "bigq", device_map: str = "cpu"
) -> Path:
    """Write `folder` the long way, from a model in memory."""
    loaded = load_and_quantize_model(model, source, config, device_map, progress=False)
    save_quantized(loaded, folder, layout=layout)
    return folder
