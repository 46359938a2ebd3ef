"""The plain model that computes what a quantized one stands for."""

import torch

from bigq import QuantizedModule


def dequantized(model, plain):
    """`plain` with the weights that those of the quantized `model` stand for, and nothing else of bigq."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            for leaf in module.descriptions:
                getattr(plain.get_submodule(path), leaf).data = getattr(module, leaf).dequantize(torch.float32).cpu()
    return plain
