"""linear_in_transforms: a linear under the transforms of torch.func, in ops that each of them knows.

The node of autograd that torch.library makes for an op is refused by these transforms, or drops tangents where two of
them are nested. A product with the dequantized weight has every derivative.
"""

from torch import Tensor
from torch.nn import functional as F

from bigq.ops import library
from bigq.ops.replays import Settings, State

__all__ = ["linear_in_transforms"]


def linear_in_transforms(name: str, x: Tensor, state: State, settings: Settings) -> Tensor:
    """The op `name` of x [..., K], as `eager.linear` calls it: derivatives reach x and the bias."""
    packed, absmax, bias, *nested = state
    own = settings if name == "linear_int8" else (*settings[:-1], x.shape[-1])
    dense = library.dequantized(name, packed, absmax, nested, own, x.dtype)  # type: ignore[arg-type]
    out = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    if name != "linear_int8":
        return out
    # The op rounds activations. The derivative of that is 1, so zeros with the derivatives of `out` are added.
    bias = None if bias is None else bias.detach()
    rounded: Tensor = library.linear_int8(x.detach(), packed, absmax, bias, *settings)
    return rounded + (out - out.detach())
