"""The plain model that computes what a quantized one stands for."""

import torch

from bigq import QuantizedLinear


def dequantized(model, source):
    """`source` with the weights that `model`'s quantized layers stand for, and nothing else of bigq."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            source.get_submodule(name).weight.data = module.dequantize(torch.float32).cpu()
    return source
