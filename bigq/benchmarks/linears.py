"""bench_linears: the linears of every format beside the float one, and beside what the memory of the device allows."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq.benchmarks.formats import BENCH_FORMATS
from bigq.benchmarks.result import BenchResult, Row
from bigq.formats import Format, State, dtype_name
from bigq.measuring.environment import Environment
from bigq.measuring.rates import copy_rate, product_rate
from bigq.measuring.reading import Reading, read_call

__all__ = ["Floor", "bench_linears", "default_shapes", "default_tokens"]

_SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # N, K of the linears of an 8B Llama
_TOKENS = (1, 4, 16, 64, 512, 4096)
_CPU_SHAPES, _CPU_TOKENS = ((1024, 1024), (4096, 1024)), (1, 16)
_CPU_REPEATS = 9

Call = Callable[[], object]


class Floor:
    """The least time that a product can take, from what a device was measured to do.

    Args:
        bytes_per_s: of a copy in its memory, read plus written.
        operations_per_s: of a large product; a multiplication and an addition are two.
    """

    def __init__(self, bytes_per_s: float, operations_per_s: float) -> None:
        self.bytes_per_s, self.operations_per_s = bytes_per_s, operations_per_s

    def us(self, nbytes: int, operations: int) -> float:
        """Microseconds that moving `nbytes` or computing takes, whichever is longer."""
        return 1e6 * max(nbytes / self.bytes_per_s, operations / self.operations_per_s)


def default_shapes(device: torch.device) -> tuple[tuple[int, int], ...]:
    """(N, K) of the linears of an 8B Llama; of two smaller ones on a CPU."""
    return _SHAPES if device.type == "cuda" else _CPU_SHAPES


def default_tokens(device: torch.device) -> tuple[int, ...]:
    """Numbers of tokens, fewer on a CPU."""
    return _TOKENS if device.type == "cuda" else _CPU_TOKENS


def bench_linears(
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    formats: Sequence[str] | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> BenchResult:
    """Time x [M, K] times the transposed weight [N, K] in every format, and in float.

    On a GPU, weights rotate through more memory than its cache holds, and calls run in a CUDA graph, in bfloat16. On a
    CPU one weight is used again and again, in float32. The floor counts weight, scales, x and output once at the rate
    of a copy in memory, or the product at that of a large product.

    Args:
        device: a GPU or the CPU.
        shapes: (N, K) = (out_features, in_features). None: `default_shapes`.
        tokens: rows of x. None: `default_tokens`.
        formats: keys of BENCH_FORMATS. None: all.
        progress: takes a line for each shape.

    Returns:
        rows with "us", and derived: "GB/s", "of the floor" and "times float's speed".
    """
    shapes = default_shapes(device) if shapes is None else shapes
    tokens = default_tokens(device) if tokens is None else tokens
    chosen = {name: BENCH_FORMATS[name] for name in (BENCH_FORMATS if formats is None else formats)}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    progress("measuring the floor")
    floor = _floor(device, dtype)
    rows: list[Row] = []
    with torch.no_grad():
        for n, k in shapes:
            progress(f"{n} x {k}")
            weight = torch.randn(n, k, device=device).to(dtype)
            states = {name: _rotation(own.quantize(weight), device) for name, own in chosen.items()}
            dense = _rotation({"weight": weight}, device)
            for m in tokens:
                x = torch.randn(m, k, device=device).to(dtype)
                base = _time([partial(F.linear, x, state["weight"]) for state in dense], device, (m, n, k))
                rows.append(_row(None, dtype, (n, k), m, base, base, floor))
                for name, rotation in states.items():
                    calls: list[Call] = [partial(chosen[name].linear, x, state, None) for state in rotation]
                    found = _time(calls, device, (m, n, k))
                    rows.append(_row((name, chosen[name]), dtype, (n, k), m, found, base, floor))
    return BenchResult(
        benchmark="linears",
        settings={
            "dtype": dtype_name(dtype),
            "timing": "CUDA graph" if device.type == "cuda" else "single calls",
            "copy_bytes_per_s": floor.bytes_per_s,
            "operations_per_s": floor.operations_per_s,
        },
        rows=tuple(rows),
        environment=Environment.of(device),
    )


def _row(
    own: tuple[str, Format] | None,
    dtype: torch.dtype,
    shape: tuple[int, int],
    m: int,
    found: Reading,
    base: Reading,
    floor: Floor,
) -> Row:
    """The row of a linear that took `found` us where the float one took `base`; `own` is None for that one."""
    n, k = shape
    if own is None:
        name, nbytes = dtype_name(dtype), n * k * dtype.itemsize
    else:
        name, nbytes = own[0], sum(tensor.nbytes for tensor in own[1].state_spec((n, k)).values())
    nbytes += dtype.itemsize * m * (n + k)
    return Row(
        what={"shape": f"{n}x{k}", "tokens": m, "format": name},
        readings={"us": found},
        derived={
            "GB/s": nbytes / found.value / 1e3,
            "of the floor": floor.us(nbytes, 2 * m * n * k) / found.value,
            "times float's speed": base.value / found.value,
        },
    )


def _time(calls: list[Call], device: torch.device, sizes: tuple[int, int, int]) -> Reading:
    if device.type != "cuda":
        return read_call(calls[0], device, repeats=_CPU_REPEATS, factor=1e6)
    from bigq_kernels.timing import is_hot, readings

    return Reading.of(readings(calls, rest=is_hot(*sizes)))


def _rotation(state: State, device: torch.device) -> list[dict[str, Tensor]]:
    """As many copies of a weight as it takes that none of them is still in a GPU's cache; on a CPU the weight alone."""
    if device.type != "cuda":
        return [dict(state)]
    from bigq_kernels.timing import copies

    nbytes = sum(tensor.nbytes for tensor in state.values())
    return [{name: tensor.clone() for name, tensor in state.items()} for _ in range(copies(nbytes))]


def _floor(device: torch.device, dtype: torch.dtype) -> Floor:
    on_gpu = device.type == "cuda"
    return Floor(
        copy_rate(device, 1 << 30 if on_gpu else 1 << 26).value,
        product_rate(device, 8192 if on_gpu else 512, dtype).value,
    )
