"""Modules of one weight, and the formats to quantize it in."""

import torch
from torch import nn

from bigq import FP4, NF4, Int8, QuantizationConfig, load_and_quantize_model

FORMATS = {"nf4": NF4(), "nf4-double": NF4(double_quant=True), "fp4": FP4(block_size=32), "int8": Int8()}


class Holder(nn.Module):
    """A module of one weight that is no linear: a matrix [N, K], or a stack of them."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class TransposedExperts(Holder):
    """Matrices [E, K, N], as transformers' fused experts hold them."""

    is_transposed, num_experts = True, 7


def quantized(module, weight_format=None, **settings):
    """`module` on the CPU with its weight quantized in place, also where it is none that is quantized by default."""
    named = ["weight"] if type(module) in (Holder, nn.Embedding) else []
    config = QuantizationConfig(weight_format or NF4(), also_quantize=named, **settings)
    return load_and_quantize_model(module, None, config, "cpu")


def near(got, expected):
    """Whether they are as near as quantizing once more in 4 bits leaves them."""
    return (got - expected).norm() <= 0.12 * expected.norm()
