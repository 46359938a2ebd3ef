"""examine_kernels: which kernel multiplies by a weight of some shapes and numbers of tokens, and why."""

from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING

import torch

from bigq.ops.library import cuda_implementation

if TYPE_CHECKING:
    from bigq_kernels.gpu import Gpu

__all__ = ["KernelChoice", "choices", "examine_kernels"]

_SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # N, K of the linears of an 8B Llama
_TOKENS = (1, 16, 128, 2048)
_BLOCK_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """The kernel of one product in bfloat16.

    Args:
        format: "nf4" (fp4 is the same) or "int8".
        n: out_features.
        k: in_features.
        tokens: rows of x.
        way: the name of the kernel.
        why: what decided.
        config: its tiles, pipeline and programs; empty where it has none.
    """

    format: str
    n: int
    k: int
    tokens: int
    way: str
    why: str
    config: dict[str, object]


def examine_kernels(device: torch.device) -> tuple[KernelChoice, ...]:
    """The kernels of the linears of an 8B Llama on a device; where the reference runs, one row that says why."""
    if device.type != "cuda":
        return (_reference("The device is a CPU, where torch's ops multiply by the dequantized weight."),)
    if cuda_implementation("linear_4bit").__module__ == "bigq.ops.reference":
        return (_reference("BIGQ_REFERENCE=1 is set, so torch's ops multiply by the dequantized weight."),)
    return choices(device)


def choices(device: "torch.device | Gpu") -> tuple[KernelChoice, ...]:
    """The kernels of the linears of an 8B Llama on a CUDA device, or on a GPU that is described."""
    from bigq_kernels.block4.choose import choose as choose_4bit
    from bigq_kernels.int8.choose import choose as choose_int8

    rows = []
    for m in _TOKENS:
        for n, k in _SHAPES:
            four = choose_4bit(device, m, n, k, _BLOCK_SIZE, torch.bfloat16)
            eight = choose_int8(device, m, n, k, torch.bfloat16, True)
            for name, way, why, config in (
                ("nf4", four.way, four.why, four.config),
                ("int8", eight.way, eight.why, eight.config),
            ):
                row = KernelChoice(format=name, n=n, k=k, tokens=m, way=way, why=why, config=_fields(config))
                rows.append(row)
    return tuple(sorted(rows, key=lambda row: row.format, reverse=True))


def _reference(why: str) -> KernelChoice:
    return KernelChoice(format="all", n=0, k=0, tokens=0, way="reference", why=why, config={})


def _fields(config: object) -> dict[str, object]:
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
