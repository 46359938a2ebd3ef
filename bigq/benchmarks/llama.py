"""Llama: a model of Llama's shape in plain torch, and a checkpoint of random numbers for it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bigq.errors import CheckpointError

__all__ = ["SHAPES", "Llama", "LlamaShape", "skeleton", "write_checkpoint"]

_SHARD_NBYTES = 2 << 30
_ROPE_THETA = 500_000.0
_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of its parameters in `dtype`."""
        width = self.hidden // self.heads
        attention = 2 * self.hidden * width * (self.heads + self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return (2 * self.vocabulary * self.hidden + self.hidden + self.layers * block) * dtype.itemsize

    def of_nbytes(self, nbytes: int, dtype: torch.dtype) -> "LlamaShape":
        """The same with as many layers, one or more, as come closest to `nbytes`."""
        none, one = replace(self, layers=0).nbytes(dtype), replace(self, layers=1).nbytes(dtype)
        return replace(self, layers=max(1, round((nbytes - none) / (one - none))))


SHAPES = {
    "tiny": LlamaShape(hidden=256, intermediate=704, layers=2, heads=4, kv_heads=2, vocabulary=1024),
    "135m": LlamaShape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152),
    "1b": LlamaShape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256),
    "8b": LlamaShape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256),
}


class _Made(TypedDict):
    """How the parameters of a module are made."""

    device: torch.device
    dtype: torch.dtype


class Block(nn.Module):
    """Attention with shared keys and values, and a gated MLP; each adds to its input."""

    def __init__(self, shape: LlamaShape, made: _Made) -> None:
        super().__init__()
        width = shape.hidden // shape.heads
        self.heads, self.kv_heads, self.width = shape.heads, shape.kv_heads, width
        self.input_norm = nn.RMSNorm(shape.hidden, eps=_EPSILON, **made)
        self.q_proj = nn.Linear(shape.hidden, shape.heads * width, bias=False, **made)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * width, bias=False, **made)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * width, bias=False, **made)
        self.o_proj = nn.Linear(shape.heads * width, shape.hidden, bias=False, **made)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=_EPSILON, **made)
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False, **made)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False, **made)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False, **made)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, M, hidden]; cos and sin [M, width]."""
        batch, tokens, _ = x.shape
        normed = self.input_norm(x)
        q = _rotated(self.q_proj(normed).view(batch, tokens, self.heads, self.width).transpose(1, 2), cos, sin)
        k = _rotated(self.k_proj(normed).view(batch, tokens, self.kv_heads, self.width).transpose(1, 2), cos, sin)
        v = self.v_proj(normed).view(batch, tokens, self.kv_heads, self.width).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        normed = self.mlp_norm(x)
        added: Tensor = x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return added


class Llama(nn.Module):
    """A Llama without a KV cache: each call computes all of its tokens."""

    _no_split_modules = ("Block",)

    def __init__(self, shape: LlamaShape, made: _Made) -> None:
        super().__init__()
        # `nn.Embedding` would draw numbers; on meta torch imports its compiler for that, which takes 5 s.
        numbers = torch.empty(shape.vocabulary, shape.hidden, **made)
        self.embed = nn.Embedding.from_pretrained(numbers, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Block(shape, made) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=_EPSILON, **made)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, **made)
        self.width = shape.hidden // shape.heads

    def forward(self, ids: Tensor) -> Tensor:
        """The logits [B, M, vocabulary] of token ids [B, M]."""
        x = self.embed(ids)
        half = torch.arange(0, self.width, 2, device=x.device) / self.width
        angles = torch.outer(torch.arange(ids.shape[1], device=x.device), _ROPE_THETA**-half)
        angles = torch.cat([angles, angles], dim=1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def skeleton(shape: LlamaShape, dtype: torch.dtype) -> Llama:
    """A Llama on the meta device, in eval mode."""
    return Llama(shape, {"device": torch.device("meta"), "dtype": dtype}).eval()


def write_checkpoint(shape: LlamaShape, folder: Path, dtype: torch.dtype, device: torch.device) -> int:
    """Write random numbers for a Llama of `shape` to safetensors files in `folder`; returns their bytes.

    Args:
        shape: of the model.
        folder: that exists.
        dtype: of all tensors.
        device: that makes the numbers: a core takes a minute for 16 GB.

    Raises:
        CheckpointError: a file cannot be written, such as on a full drive.
    """
    generator = torch.Generator(device).manual_seed(0)
    places: dict[str, str] = {}
    nbytes = 0
    for number, names in enumerate(_shards(shape, dtype)):
        file = f"model-{number:05}.safetensors"
        tensors = {name: _random(spec, generator).cpu() for name, spec in names.items()}
        try:
            save_file(tensors, folder / file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot write {folder / file}: {error}") from error
        nbytes += (folder / file).stat().st_size
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return nbytes


def _shards(shape: LlamaShape, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The parameters on meta, in files of at most 2 GiB, or of one tensor."""
    names: dict[str, Tensor] = {}
    nbytes = 0
    for name, parameter in skeleton(shape, dtype).named_parameters():
        if names and nbytes + parameter.nbytes > _SHARD_NBYTES:
            yield names
            names, nbytes = {}, 0
        names[name] = parameter
        nbytes += parameter.nbytes
    yield names


def _random(spec: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers for a parameter: of a matrix normal ones that keep the size of activations, of a norm ones."""
    if spec.ndim < 2:
        return torch.ones(spec.shape, dtype=spec.dtype)
    return (
        torch.randn(spec.shape, generator=generator, device=generator.device)
        .mul_(spec.shape[-1] ** -0.5)
        .to(spec.dtype)
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
