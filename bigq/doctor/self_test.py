"""self_test: quantize, dequantize and multiply on a device, and compare with the definitions of the formats."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq.doctor.definitions import block_maxima, nearest_values, product_int8
from bigq.formats import FP4, NF4, Format, Int8, State, dtype_name
from bigq.formats.block4 import Block4

__all__ = ["Check", "self_test"]

_N = 256
_KS = (512, 200)  # of whole blocks and vectors, and of neither
_TOKENS = (1, 2, 8, 64, 300)  # the numbers of tokens at which kernels change
_CALLS = 3  # the first runs, the second is recorded, the third is replayed
_FORMATS: tuple[Format, ...] = (NF4(), NF4(block_size=32, double_quant=True), FP4(), Int8())


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim about a format on a device.

    Args:
        what: the claim.
        passed: whether it holds.
        detail: what was found instead; "" if it holds.
    """

    what: str
    passed: bool
    detail: str = ""


def self_test(device: torch.device) -> tuple[Check, ...]:
    """Test every format on `device`; on a GPU its kernels, replays and all.

    Codes and scales have to be what the format's definition says, and on a GPU the bits of the reference. A product has
    to be as close to one in float64 as twice the error of torch's own product, and the same in three calls.

    Returns:
        the checks; one that raises has failed.
    """
    return tuple(check for weight_format in _FORMATS for check in _of_format(weight_format, device))


def _of_format(weight_format: Format, device: torch.device) -> Iterator[Check]:
    said = f"{weight_format.name}{' double_quant' if getattr(weight_format, 'double_quant', False) else ''}"
    for k in _KS:
        weight = torch.randn(_N, k, generator=torch.Generator().manual_seed(k))
        weight[0] = 0.0
        weight[1] *= 1e-3
        yield _checked(f"{said}, K = {k}: codes and scales", partial(_codes, weight_format, weight, device))
        for dtype in (torch.float32, torch.bfloat16):
            what = f"{said}, K = {k}: products in {dtype_name(dtype)}"
            yield _checked(what, partial(_products, weight_format, weight, dtype, device))


def _checked(what: str, examine: Callable[[], str]) -> Check:
    """The check of a function that returns what is wrong, or ""."""
    try:
        wrong = examine()
    except Exception as error:  # a compiler's error is a finding, too
        wrong = f"{type(error).__name__}: {error}"
    return Check(what=what, passed=not wrong, detail=wrong)


def _codes(weight_format: Format, weight: Tensor, device: torch.device) -> str:
    """What is wrong with the codes and scales of a weight, and with what they decode to."""
    shape = tuple(weight.shape)
    state = weight_format.quantize(weight.to(device))
    dense = weight_format.dequantize(state, shape, torch.float32).cpu()
    scales = weight_format.scales(state).cpu()
    distance = (dense.double() - weight.double()).abs()
    if isinstance(weight_format, Block4):
        maxima = block_maxima(weight, weight_format.block_size)
        # Double quantization stores a scale as 8 bits of its distance from the mean, which is at most the largest.
        slack = maxima.max() * 0.01 if weight_format.double_quant else 0.0
        if bool(((scales.double() - maxima).abs() > slack).any()):
            return "a scale is not the largest magnitude of its block"
        nearest, wide = nearest_values(weight, scales, weight_format.quant_type, weight_format.block_size)
        # FP4's boundaries are constants that lie up to 14 ulp beside the middle of two values. A code is chosen by the
        # scale before it is quantized.
        allowed = nearest + wide.abs() * 1e-6 + 2 * slack
    else:
        maxima = block_maxima(weight, weight.shape[1])
        if not torch.equal(scales.double(), maxima):
            return "a scale is not the largest magnitude of its row"
        allowed = maxima / 127 * (0.5 + 1e-4)
    if bool((distance > allowed).any()):
        return f"a number is decoded {(distance - allowed).max():.3g} further away than to its nearest code"
    if device.type == "cuda":
        expected = weight_format.quantize(weight)
        # The mean that double quantization stores is torch's own, which adds up in another order on a GPU.
        exact = {"packed": expected["packed"]} if getattr(weight_format, "double_quant", False) else expected
        for part, tensor in exact.items():
            if not torch.equal(state[part].cpu(), tensor):
                return f"{part} differs from the reference on the CPU in {_different(state[part].cpu(), tensor)}"
        there = {part: tensor.to(device) for part, tensor in expected.items()}
        decoded = weight_format.dequantize(there, shape, torch.float32).cpu()
        if not torch.equal(decoded, weight_format.dequantize(expected, shape, torch.float32)):
            return "decoded numbers differ from those of the reference on the CPU"
    return ""


def _products(weight_format: Format, weight: Tensor, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with products of a weight."""
    state = weight_format.quantize(weight.to(device=device, dtype=dtype))
    dense = weight_format.dequantize(state, tuple(weight.shape), torch.float32)
    bias = torch.linspace(-1, 1, _N).to(device=device, dtype=dtype)
    for tokens in _TOKENS:
        x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
        if isinstance(weight_format, Int8):
            x[0, 3] = 20.0  # an outlier column
        x = x.to(device)
        outs = [weight_format.linear(x, state, bias, weight.shape[1]) for _ in range(_CALLS)]
        if any(not torch.equal(out, outs[0]) for out in outs[1:]):
            return f"{tokens} tokens: {_CALLS} calls give different numbers, so a replay is wrong"
        exact, baseline = _expected(weight_format, x.cpu(), dense.cpu(), bias.cpu(), state)
        error = (outs[0].cpu().double() - exact).norm().item()
        allowed = 2 * (baseline - exact).norm().item() + exact.norm().item() * torch.finfo(dtype).eps / 2
        if not error <= allowed:
            return f"{tokens} tokens: the error is {error:.3g}, and {allowed:.3g} is allowed"
    return ""


def _expected(weight_format: Format, x: Tensor, dense: Tensor, bias: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """A product in float64, and one that torch computes in the dtype of x."""
    plain = F.linear(x, dense.to(x.dtype), bias).double()
    if not isinstance(weight_format, Int8):
        return x.double() @ dense.double().T + bias.double(), plain
    codes, absmax = state["packed"].cpu(), weight_format.scales(state).cpu()
    exact = product_int8(x, codes, absmax, weight_format.threshold) + bias.double()
    return exact, exact + (plain - (x.double() @ dense.double().T + bias.double()))


def _different(one: Tensor, other: Tensor) -> str:
    return f"{int((one != other).sum())} of {other.numel()} numbers" if one.shape == other.shape else "its shape"
