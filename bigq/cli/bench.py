"""`bigq bench`: the linears of every format on this GPU, beside bf16 and beside what its memory allows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from bigq.cli.output import answers, print_line
from bigq.errors import UnsupportedError
from bigq.formats import FP4, NF4, Format, Int8, State

__all__ = ["FORMATS", "Machine", "bench", "command", "parse_shapes", "parse_tokens"]

FORMATS: dict[str, Format] = {
    "nf4": NF4(),
    "nf4-dq": NF4(double_quant=True),
    "fp4": FP4(),
    "int8": Int8(),
}
SHAPES = "4096x4096,1024x4096,14336x4096,4096x14336"  # N x K of the linears of an 8B Llama
TOKENS = "1,4,16,64,512,4096"
HEADER = ("N x K", "tokens", "format", "us", "GB/s", "of the floor", "bf16 us", "times bf16's speed")

Timer = Callable[[list[Callable[[], object]]], float]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a GPU was measured to do: bytes a second of a copy, read plus written, and bf16 operations a second."""

    bytes_per_s: float
    operations_per_s: float

    def floor_us(self, nbytes: int, operations: int) -> float:
        """Microseconds that moving `nbytes` or computing takes, whichever is longer."""
        return 1e6 * max(nbytes / self.bytes_per_s, operations / self.operations_per_s)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """[(N, K), ...] of "NxK,NxK"; raises BadParameter for anything else."""
    try:
        shapes = [(int(n), int(k)) for n, k in (item.split("x") for item in text.split(","))]
    except ValueError:
        shapes = []
    if not shapes or min(map(min, shapes)) < 1:
        raise typer.BadParameter(f"{text!r} is no list of shapes; expected N x K like 4096x4096,14336x4096")
    return shapes


def parse_tokens(text: str) -> list[int]:
    """[M, ...] of "M,M"; raises BadParameter for anything else."""
    try:
        tokens = [int(item) for item in text.split(",")]
    except ValueError:
        tokens = []
    if not tokens or min(tokens) < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers of tokens; expected one like 1,16,512")
    return tokens


@answers
def command(
    shapes: Annotated[str, typer.Option(help="N x K of the linears, separated by commas.")] = SHAPES,
    tokens: Annotated[str, typer.Option(help="Rows of x, separated by commas.")] = TOKENS,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}; may be repeated. Default: all.")
    ] = None,
) -> None:
    """Time the linears of every format on this GPU, beside bf16."""
    chosen = formats or list(FORMATS)
    for name in chosen:
        if name not in FORMATS:
            raise typer.BadParameter(f"{name!r} is no format; expected one of {', '.join(FORMATS)}")
    bench(parse_shapes(shapes), parse_tokens(tokens), chosen, print_line)


def bench(
    shapes: Iterable[tuple[int, int]], tokens: Iterable[int], formats: Iterable[str], print_row: Callable[[str], object]
) -> None:
    """Measure on the current CUDA device and print a Markdown table row by row.

    Weights rotate through more memory than the L2 cache holds, and calls run in a CUDA graph. The floor counts weight,
    scales, x and output once at the rate of a device copy, or the product at that of an 8192^3 bf16 matmul.

    Args:
        shapes: (N, K) = (out_features, in_features) of the linears.
        tokens: rows of x.
        formats: keys of FORMATS.
        print_row: takes each line.

    Raises:
        UnsupportedError: without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(f"bench needs a CUDA device, and torch {torch.__version__} sees none")
    from bigq_kernels.timing import is_hot, microseconds

    machine = _measure(microseconds)
    print_row(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies {machine.bytes_per_s / 1e12:.2f} TB/s, "
        f"multiplies {machine.operations_per_s / 1e12:.0f} Tflop/s in bf16\n"
    )
    print_row(_line(HEADER))
    print_row(_line(["---"] * len(HEADER)))
    with torch.no_grad():
        for n, k in shapes:
            weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
            states = {name: _rotation(FORMATS[name].quantize(weight)) for name in formats}
            dense = _rotation({"weight": weight})
            for m in tokens:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                rest = is_hot(m, n, k)
                bf16 = microseconds([partial(F.linear, x, state["weight"]) for state in dense], rest=rest)
                for name, rotation in states.items():
                    time = microseconds(
                        [partial(FORMATS[name].linear, x, state, None) for state in rotation], rest=rest
                    )
                    print_row(_line(row(name, n, k, m, time, bf16, machine)))


def row(name: str, n: int, k: int, m: int, time: float, bf16: float, machine: Machine) -> list[str]:
    """The cells under HEADER of a linear that took `time` us where bf16 took `bf16`."""
    spec = FORMATS[name].state_spec((n, k))
    nbytes = sum(tensor.nbytes for tensor in spec.values()) + 2 * m * (n + k)
    floor = machine.floor_us(nbytes, 2 * m * n * k)
    cells = (f"{time:.1f}", f"{nbytes / time / 1e3:.0f}", f"{floor / time:.0%}", f"{bf16:.1f}", f"{bf16 / time:.2f}")
    return [f"{n} x {k}", str(m), name, *cells]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rotation(state: State) -> list[dict[str, Tensor]]:
    """As many copies of a weight as it takes that none of them is still in the L2 cache."""
    from bigq_kernels.timing import copies

    nbytes = sum(tensor.nbytes for tensor in state.values())
    return [{name: tensor.clone() for name, tensor in state.items()} for _ in range(copies(nbytes))]


def _measure(microseconds: Timer) -> Machine:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = microseconds([partial(target.copy_, source)])
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_us = microseconds([partial(torch.mm, square, square)])
    return Machine(
        bytes_per_s=2 * source.nbytes / copy_us * 1e6, operations_per_s=2 * square.shape[0] ** 3 / product_us * 1e6
    )
