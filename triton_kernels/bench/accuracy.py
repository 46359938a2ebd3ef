"""Size and error of every format, and of bitsandbytes on the same inputs, as a markdown table.

    python triton_kernels/bench/accuracy.py [model.safetensors]

Runs on the GPU if there is one. The real weights are the matrices of the checkpoint, without embeddings and head.

bits: stored codes and scales of a weight, without what a layer stores once (here a description of 256 bytes; in
    bitsandbytes, tables and JSON). Rows that end in a partial block have more scales.
weight: |W' - W| / |W| (Frobenius), W' being the dequantized weight; over all real weights, and for 4096 x 4096 N(0, 1).
original, dequantized: |Y - X W^T| / |X W^T| for that normal W, then with W' for W, which is the error of the product
    alone (for int8, with that of rounding X). Exact products are float64. X is 16 tokens, its channels of unequal
    scale and four of them outliers of up to 60.
"""

import argparse
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (1, 2)]  # a bare checkout works

import bigq  # noqa: E402

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
except ImportError:
    bnb = None

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, SIZE = 16, 4096
DTYPES = (torch.bfloat16, torch.float32)
CONFIGS = [
    *(
        bigq.QuantizationConfig(name, block_size=block_size, double_quant=double_quant)
        for block_size in (64, 128)
        for name in ("nf4", "fp4")
        for double_quant in (False, True)
    ),
    bigq.QuantizationConfig("int8"),
]
# A quantized weight: its stored tensors, the weight they stand for in float32, and its linear.
Quantized = tuple[list[Tensor], Tensor, Callable[[Tensor], Tensor]]


def ours(weight: Tensor, config: bigq.QuantizationConfig) -> Quantized:
    state = bigq.quantize_tensor(weight, config)
    stored = tuple(state.tensors.values())
    return (
        list(stored),
        bigq.dequantize_tensor(state, torch.float32),
        lambda x: state.description.format.linear(x, state.tensors, None),
    )


def theirs(weight: Tensor, config: bigq.QuantizationConfig) -> Quantized:
    form = config.weight_format()
    if isinstance(form, bigq.Int8):
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        layer = bnb.MatmulLtState(CB=codes, SCB=absmax)
        layer.has_fp16_weights = layer.is_training = False
        dense = bnb.functional.int8_vectorwise_dequant(codes, absmax)
        return [codes, absmax], dense.float(), lambda x: bnb.matmul(x, codes, state=layer, threshold=form.threshold)
    # Flat, because the CPU decodes a matrix wrongly where its rows are multiples of 16 but not of the block size.
    packed, state = bnb.functional.quantize_4bit(
        weight.flatten(),
        blocksize=form.block_size,
        quant_type=form.name,
        compress_statistics=form.double_quant,
    )
    dense = bnb.functional.dequantize_4bit(packed, state).view(weight.shape)
    state.shape = weight.shape
    stored = [packed, state.absmax]
    if form.double_quant:
        stored += [state.state2.absmax, state.offset]
    return stored, dense, lambda x: bnb.matmul_4bit(x, packed.t(), state)


def real_weights(path: Path | None) -> list[Tensor]:
    if path is None:
        return []
    with safe_open(path, "pt", device=str(DEVICE)) as file:
        names = [name for name in file.keys() if "embed" not in name and "head" not in name]  # noqa: SIM118
        return [w.float() for name in names if (w := file.get_tensor(name)).ndim == 2]


def activations() -> Tensor:
    x = torch.randn(TOKENS, SIZE, device=DEVICE) * torch.exp(0.5 * torch.randn(SIZE, device=DEVICE))
    for channel, scale in zip((17, 800, 2000, 4001), (10.0, 15.0, 20.0, 60.0), strict=True):
        x[:, channel] = scale * torch.rand(TOKENS, device=DEVICE)
    return x


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def bits_and_error(pairs: list[tuple[Tensor, Quantized]]) -> list[str]:
    if not pairs:
        return ["", ""]
    bits = sum(8 * tensor.nbytes for _, (stored, _, _) in pairs for tensor in stored)
    error = sum((dense.double() - weight).square().sum().item() for weight, (_, dense, _) in pairs)
    norm = sum(weight.double().square().sum().item() for weight, _ in pairs)
    return [f"{bits / sum(weight.numel() for weight, _ in pairs):.4f}", f"{(error / norm) ** 0.5:.5f}"]


def output_errors(weight: Tensor, quantized: Quantized, x: Tensor) -> list[str]:
    _, dense, linear = quantized
    row = []
    for dtype in DTYPES:
        inputs = x.to(dtype)
        out = linear(inputs)
        row += [f"{relative(out, inputs.double() @ w.double().T):.2e}" for w in (weight, dense)]
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path, nargs="?", help="safetensors file with real weights")
    real = real_weights(parser.parse_args().checkpoint)
    torch.manual_seed(0)
    weight, x = torch.randn(SIZE, SIZE, device=DEVICE), activations()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine() + " CPU"
    libraries = {"bigq": ours} if bnb is None else {"bigq": ours, "bitsandbytes": theirs}
    versions = [f"bigq {bigq.__version__}"] + ([] if bnb is None else [f"bitsandbytes {bnb.__version__}"])
    print(f"{name}, torch {torch.__version__}", *versions, sep=", ")
    ends = [f"{str(dtype).removeprefix('torch.')}, {end}" for dtype in DTYPES for end in ("original", "dequantized")]
    header = ["format", "block", "library", "bits, real", "weight, real", "bits, normal", "weight, normal", *ends]
    print("", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header))), sep="\n")
    for config in CONFIGS:
        form = config.weight_format()
        label = form.name + (" + double quant" if getattr(form, "double_quant", False) else "")
        block = "row" if isinstance(form, bigq.Int8) else str(form.block_size)
        for library_name, library in libraries.items():
            row = [label, block, library_name]
            quantized = library(weight, config)
            row += bits_and_error([(w, library(w, config)) for w in real]) + bits_and_error([(weight, quantized)])
            print(f"| {' | '.join(row + output_errors(weight, quantized, x))} |", flush=True)


if __name__ == "__main__":
    main()
