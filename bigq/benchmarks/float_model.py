"""load_float: a model in float from safetensors files, as safetensors alone loads it: what a load of ours is beside."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

__all__ = ["load_float"]


def load_float(model: nn.Module, folder: Path, device: torch.device) -> nn.Module:
    """Put the tensors of all files in `folder` into a model on meta, file by file, on `device`."""
    for file in sorted(folder.glob("*.safetensors")):
        model.load_state_dict(load_file(file, device=str(device)), strict=False, assign=True)
    return model
