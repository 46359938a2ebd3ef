"""Microseconds and GB/s of the quantize and dequantize launchers, beside bitsandbytes: python bench/quantize.py."""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.quantize import quantize_4bit
from bigq_kernels.int8.dequantize import dequantize_int8
from bigq_kernels.int8.quantize import quantize_int8
from bigq_kernels.timing import copies, microseconds

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

SHAPES = [(4096, 4096), (14336, 4096), (8192, 8192)]


def main() -> None:
    print("| N x K | op | us | GB/s | bitsandbytes us |")
    print("|---|---|---|---|---|")
    for n, k in SHAPES:
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
        packed = [quantize_4bit(w, "nf4", 64) for w in dense]
        rows = [quantize_int8(w) for w in dense]
        four, eight = n * k * (2 + 4.5 / 8), n * k * 3  # bytes read and written
        ops = {
            "quantize nf4": (four, [partial(quantize_4bit, w, "nf4", 64) for w in dense]),
            "quantize fp4": (four, [partial(quantize_4bit, w, "fp4", 64) for w in dense]),
            "dequantize nf4": (
                four,
                [partial(dequantize_4bit, w, a, "nf4", 64, k, torch.bfloat16) for w, a in packed],
            ),
            "quantize int8": (eight, [partial(quantize_int8, w) for w in dense]),
            "dequantize int8": (eight, [partial(dequantize_int8, w, a, torch.bfloat16) for w, a in rows]),
        }
        theirs = {}
        if bnb:
            functional = bnb.functional
            states = [functional.quantize_4bit(w, quant_type="nf4") for w in dense]
            halves = [w.half() for w in dense]
            theirs = {
                "quantize nf4": [partial(functional.quantize_4bit, w, quant_type="nf4") for w in dense],
                "quantize fp4": [partial(functional.quantize_4bit, w, quant_type="fp4") for w in dense],
                "dequantize nf4": [partial(functional.dequantize_4bit, q, s) for q, s in states],
                "quantize int8": [partial(functional.int8_vectorwise_quant, w) for w in halves],
            }
        for name, (nbytes, calls) in ops.items():
            time = microseconds(calls)
            # Not captured: bitsandbytes copies its code table from the CPU in each call.
            other = f"{microseconds(theirs[name], graph=False):.1f}" if name in theirs else "-"
            print(f"| {n} x {k} | {name} | {time:.1f} | {nbytes / time / 1e3:.0f} | {other} |", flush=True)


if __name__ == "__main__":
    main()
