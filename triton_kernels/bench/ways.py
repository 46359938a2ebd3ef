"""Which kernel runs when, as the tables of triton_kernels/README.md: python bench/ways.py, with --write into that page.

The tables come from `choose`, on an H100 with a release of Triton that the Gluon kernels are tested with. No GPU is
needed.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bigq_kernels.block4 import choose as block4
from bigq_kernels.gpu import Gpu
from bigq_kernels.int8 import choose as int8

PAGE = Path(__file__).resolve().parents[1] / "README.md"
MARKS = "<!-- written by bench/ways.py -->", "<!-- end -->"
SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (8192, 28672), (14336, 4096), (28672, 8192), (4100, 11008)]
MOST = 2100  # tokens that are asked for: above, every way stays
GPU = Gpu.named("h100")


def spans(way: Callable[[int], str]) -> str:
    """The ways of 1 to MOST tokens: "1 `dp4a`, 2 to 32 `staged`, from 33 `dequantize`"."""
    found = []
    for name, group in groupby(range(1, MOST + 1), way):
        first, *_, last = [*group] * 2  # a way may have one number of tokens
        span = f"from {first}" if last == MOST else f"{first} to {last}" if last > first else f"{first}"
        found.append(f"{span} `{name}`")
    return ", ".join(found)


def tables() -> str:
    """Markdown: 4-bit weights by shape and block size, then int8 weights by dtype of x and threshold."""

    def of_block4(n: int, k: int, block_size: int) -> str:
        return spans(lambda m: block4.choose(GPU, m, n, k, block_size, torch.bfloat16).way)

    def of_int8(dtype: torch.dtype, outliers: bool) -> str:
        return spans(lambda m: int8.choose(GPU, m, 4096, 4096, dtype, outliers).way)

    lines = ["| N x K, 4 bits | blocks of 64 and more | blocks of 32, or no Gluon |", "|---|---|---|"]
    lines += [f"| {n} x {k} | {of_block4(n, k, 64)} | {of_block4(n, k, 32)} |" for n, k in SHAPES]
    lines += ["", "| int8, any N x K | no threshold | a threshold |", "|---|---|---|"]
    for name, dtype in (("bfloat16, float16", torch.bfloat16), ("float32", torch.float32)):
        lines.append(f"| x is {name} | {of_int8(dtype, False)} | {of_int8(dtype, True)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The text of the page with the tables between its MARKS."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{tables()}\n\n{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md instead of printing")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
