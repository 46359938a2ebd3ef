"""Checkpoints of codes with scales: what a float checkpoint becomes in FP8, int8 or MXFP4, and its numbers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def grid(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """A scale for each number of a weight of `shape`, of scales [..., rows / block, columns / block]."""
    spread = scales.float().repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return spread[..., : shape[-2], : shape[-1]]


def in_fp8(weight: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Codes of `weight`, and scales that are no powers of two, one for each block of rows and columns."""
    *leading, rows, columns = weight.shape
    shape = (*leading, -(-rows // block[0]), -(-columns // block[1]))
    scales = torch.rand(shape) * 0.01 + 0.001
    return (weight.float() / grid(scales, weight.shape, block)).clamp(-200, 200).to(dtype), scales


def numbers(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What the codes stand for: a product in float32, rounded once."""
    return (codes.float() * grid(scales, codes.shape, block)).to(dtype)


def powers(exponents: Tensor) -> Tensor:
    """Two to the power of bytes of exponents, as MX formats have them."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)


def e2m1_numbers(packed: Tensor, exponents: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What packed codes [..., K/2] with exponents [..., K/32] stand for."""
    values = torch.stack([E2M1_VALUES[(packed & 15).long()], E2M1_VALUES[(packed >> 4).long()]], dim=-1).flatten(-2)
    factors = powers(exponents)
    return (values * factors.repeat_interleave(32, dim=-1)).to(dtype)


def write(folder: Path, tensors: dict[str, Tensor], said: dict[str, object] | None = None, **config: object) -> Path:
    """A folder with a safetensors file, and a config.json that says how it is quantized."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if said is not None or config:
        content = {**config, **({} if said is None else {"quantization_config": said})}
        (folder / "config.json").write_text(json.dumps(content))
    return folder
