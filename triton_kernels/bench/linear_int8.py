"""Microseconds of linear_int8 beside bf16 cuBLAS, and bitsandbytes if it is installed: python bench/linear_int8.py."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bigq_kernels.int8.linear import linear_int8
from bigq_kernels.int8.quantize import quantize_int8
from bigq_kernels.timing import copies, is_hot, microseconds

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
TOKENS = [1, 16, 64, 128, 256, 512, 4096]
OUTLIERS = [0, 1, 6, 41]  # columns of x beyond the threshold of 6.0: 41 of 4096 are 1 %


def main() -> None:
    names = ["bf16", "threshold 0", *(f"threshold 6, {count} columns" for count in OUTLIERS)]
    names += ["bnb threshold 0", "bnb threshold 6, 6 columns"] if bnb else []
    print("| N x K | M |", " | ".join(names), "|")
    print("|---" * (2 + len(names)) + "|")
    for n, k in SHAPES:
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
        weights = [quantize_int8(dense[0]) for _ in range(copies(n * k))]
        for m in TOKENS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16).clamp(-5, 5)
            inputs = {count: x.index_fill(1, torch.randperm(k, device="cuda")[:count], 8.0) for count in OUTLIERS}
            rest = is_hot(m, n, k)
            times = [
                microseconds([partial(F.linear, x, w) for w in dense], rest=rest),
                microseconds([partial(linear_int8, x, w, a, None, 0.0) for w, a in weights], rest=rest),
            ]
            for x in inputs.values():
                times.append(microseconds([partial(linear_int8, x, w, a, None, 6.0) for w, a in weights], rest=rest))
            if bnb:  # not captured: it synchronizes to learn how many outliers there are
                for threshold in (0.0, 6.0):
                    calls = []
                    for w, a in weights:
                        state = bnb.MatmulLtState()
                        state.CB, state.SCB, state.threshold, state.has_fp16_weights = w, a.flatten(), threshold, False
                        calls.append(partial(bnb.matmul, inputs[6].half(), w, state=state))
                    times.append(microseconds(calls, graph=False))
            print(f"| {n} x {k} | {m} |", " | ".join(f"{t:.1f}" for t in times), "|", flush=True)


if __name__ == "__main__":
    main()
