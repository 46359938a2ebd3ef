"""fuse_lora: layers of PEFT's LoRA over quantized linears compute the product of the weight and of the adapter at once.

PEFT's layer computes the quantized product, casts its input to the dtype of the adapter, multiplies by both factors,
scales, and adds. Here one node of autograd does all of it. PEFT's objects stay what they are: only the class of each
layer becomes a subclass with another forward, which calls PEFT's for all but the plain case.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.compiler import is_compiling

from bigq.errors import ConfigError
from bigq.ops.adapted import adapted_linear
from bigq.system.internals import calls_only_forward, something_transforms
from bigq.weight.linear import QuantizedMatrix
from bigq.weight.stored import result_dtype

__all__ = ["FusedLoraLinear", "fuse_lora", "unfuse_lora"]

_FACTORS = (nn.Parameter, Tensor)  # a plain tensor stands in a module that FSDP or functional_call has filled


class FusedLoraLinear(Linear):
    """LoRA of PEFT over a quantized linear: one node of autograd where a plain adapter is all there is to compute."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute x [..., K] times the transposed weight, plus what the adapter adds: [..., N]."""
        # A hook of accelerate's keeps this function also when `unfuse_lora` has given the layer its class back.
        is_other = args or kwargs or type(self) is Linear or is_compiling()
        adapter = None if is_other else _plain_adapter(self)
        out = None if adapter is None or type(x) is not Tensor or x.is_nested else _adapted(x, *adapter)
        return Linear.forward(self, x, *args, **kwargs) if out is None else out


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA layers of a PEFT model compute quantized product and adapter at once, forward and backward.

    A layer is fused if it is a `peft.tuners.lora.Linear` over a quantized linear or Conv1D. Call it once after
    `peft.get_peft_model` or `PeftModel.from_pretrained`, and again after an adapter was added to other modules. What
    is saved, and what a merge does, stays as it is. A fused layer goes PEFT's own way if, at a call,

    - its adapter has dropout that acts, a bias, or is a variant such as DoRA;
    - several adapters are active, none is, or it is merged or disabled;
    - without autocast, the dtypes of input and adapter differ;
    - hooks see the call of the linear or of the factors, or a transform of functorch, torch.compile or a trace does;
    - it gets `adapter_names` or any other argument than its input;
    - it had a forward of its own before, as a hook of accelerate's gives it.

    The products are those of PEFT in the same dtype, with fewer roundings between them: the result and the gradient of
    the input are sums in float32 that are rounded once, and float32 gradients of the factors are not rounded to the
    dtype of the products first (on a GPU). Gradients of gradients raise an UnsupportedError.

    Args:
        model: a PEFT model, or any that holds its layers. The class of its layers becomes a subclass of theirs.

    Returns:
        The number of layers that are fused now.

    Raises:
        ConfigError: there is no such layer in `model`.

    Example:
        >>> import bigq, peft, torch
        >>> from bigq.integrations.fused_lora import fuse_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> model = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4"), device_map="cpu")
        >>> model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
        >>> fuse_lora(model)
        1
        >>> type(model.base_model.model[0]).__name__
        'FusedLoraLinear'
    """
    count = 0
    for module in model.modules():
        if type(module) is Linear and isinstance(module.base_layer, QuantizedMatrix):
            module.__class__ = FusedLoraLinear
        count += isinstance(module, FusedLoraLinear)
    if not count:
        raise ConfigError(
            f"{type(model).__name__} has no LoRA layer over a quantized linear; expected a quantized model after "
            "peft.get_peft_model with a LoraConfig"
        )
    return count


def unfuse_lora(model: nn.Module) -> None:
    """Undo `fuse_lora`: the layers of `model` are PEFT's own again."""
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = Linear  # type: ignore[assignment]


def _plain_adapter(layer: Any) -> tuple[QuantizedMatrix, Tensor, Tensor, float] | None:
    """Linear, A [r, K], B [N, r] and scaling, if `layer` adds one adapter and nothing else happens; otherwise None."""
    if layer.disable_adapters or layer.merged_adapters or something_transforms():
        return None
    active = layer.active_adapter
    if not isinstance(active, str):
        if len(active) != 1:
            return None
        (active,) = active
    modules = layer._modules  # nn.Module's own lookup takes half a microsecond
    base, first = modules["base_layer"], modules["lora_A"]._modules.get(active)
    if first is None or active in layer.lora_variant or type(base).forward is not QuantizedMatrix.forward:
        return None
    second, dropout = modules["lora_B"]._modules[active], modules["lora_dropout"]._modules[active]
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)):
        return None
    if type(first) is not nn.Linear or type(second) is not nn.Linear or not calls_only_forward(base, first, second):
        return None
    if first._parameters["bias"] is not None or second._parameters["bias"] is not None:
        return None
    down, up, scaling = first.weight, second.weight, layer.scaling[active]
    if type(down) not in _FACTORS or type(up) not in _FACTORS or type(scaling) not in (float, int):
        return None
    return base, down, up, scaling


def _adapted(x: Tensor, base: QuantizedMatrix, down: Tensor, up: Tensor, scaling: float) -> Tensor | None:
    """The sum of both products, in the dtype of autocast or of x; None if PEFT would multiply in several dtypes."""
    dtype, autocast = result_dtype(x)
    if autocast:
        if down.dtype is torch.float64 or up.dtype is torch.float64:  # which autocast does not cast
            return None
    elif down.dtype is not dtype or up.dtype is not dtype:
        return None
    if base.compute_dtype not in (None, dtype):
        return None
    product, tensors = base.operands()
    if not autocast:
        return adapted_linear(product.op, x, down, up, scaling, dtype, tensors, product.settings)
    torch.set_autocast_enabled(autocast, False)  # the context manager takes 3 us, 448 times in a step of an 8B model
    try:
        return adapted_linear(product.op, x, down, up, scaling, dtype, tensors, product.settings)
    finally:
        torch.set_autocast_enabled(autocast, True)
