"""Choice: which kernel multiplies by a weight, its configuration, and why."""

from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Choice", "GradientConfig"]

Config = TypeVar("Config", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Choice(Generic[Config]):
    """What `choose` of a family of kernels decides from shapes, dtypes and the GPU alone."""

    way: str  # the name of the kernel
    config: Config  # its tiles, pipeline and programs
    why: str  # the limit or number that decided, in one sentence


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """Tile and pipeline of `multiply_by_rows`."""

    block_m: int  # rows of dY in a tile
    block_n: int  # rows of the weight in a step, at least 64
    block_k: int  # columns of the weight in a tile
    warps: int
    stages: int  # steps whose loads are in flight
