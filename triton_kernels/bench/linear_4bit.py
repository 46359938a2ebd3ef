"""Microseconds of linear_4bit beside bf16 cuBLAS, and bitsandbytes if it is installed: python bench/linear_4bit.py."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from bigq_kernels.block4.absmax import quantize_absmax
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.block4.quantize import quantize_4bit
from bigq_kernels.timing import copies, host_microseconds, is_hot, microseconds

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

SHAPES = [
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (28672, 8192),
    (8192, 28672),
    (128256, 4096),
    (4100, 11008),
    (5000, 4128),
]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]


def main() -> None:
    names = ["bf16", "nf4", "nf4 nested", "fp4"] + (["bnb nf4"] if bnb else [])
    print("| N x K | M |", " | ".join(names), "|")
    print("|---" * (2 + len(names)) + "|")
    for n, k in SHAPES:
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
        nf4 = [quantize_4bit(dense[0], "nf4", 64) for _ in range(copies(n * k / 2))]
        nested = [(weight, *quantize_absmax(absmax)) for weight, absmax in nf4]
        fp4 = [quantize_4bit(dense[0], "fp4", 64) for _ in nf4]
        if bnb:
            theirs = [bnb.functional.quantize_4bit(dense[0], quant_type="nf4") for _ in nf4]
        for m in TOKENS if n * k < 2**28 else TOKENS[:-2]:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            calls = [
                [partial(F.linear, x, w) for w in dense],
                [partial(linear_4bit, x, w, a, None, None, None, "nf4", 64) for w, a in nf4],
                [partial(linear_4bit, x, w, codes, None, a, offset, "nf4", 64) for w, codes, a, offset in nested],
                [partial(linear_4bit, x, w, a, None, None, None, "fp4", 64) for w, a in fp4],
            ]
            if bnb:
                calls.append([partial(bnb.matmul_4bit, x, w.t(), quant_state=s) for w, s in theirs])
            times = [microseconds(c, rest=is_hot(m, n, k)) for c in calls]
            print(f"| {n} x {k} | {m} |", " | ".join(f"{time:.1f}" for time in times), "|", flush=True)
    weight, absmax = quantize_4bit(torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16), "nf4", 64)
    for m in (1, 4):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        host = host_microseconds(partial(linear_4bit, x, weight, absmax, None, None, None, "nf4", 64))
        print(f"host time of an eager call, {m} tokens: {host:.1f} us")


if __name__ == "__main__":
    main()
