"""introduce_to_diffusers: the attributes by which diffusers knows that one of its models is quantized."""

from typing import Any

from torch import nn

from bigq.interop.diffusers_names import is_diffusers_model

__all__ = ["introduce_to_diffusers"]


def introduce_to_diffusers(model: nn.Module, config: Any) -> None:
    """Tell diffusers that `model`, if it is one of its models, is quantized as `config`, a QuantizationConfig, says.

    `save_pretrained` then writes `quantization_config` into config.json, `.to(dtype)` is refused, and
    `model.dequantize()` works.
    """
    if not is_diffusers_model(model):
        return
    from bigq.interop.diffusers_quantizer import DiffusersQuantizer

    known: Any = model
    known.quantization_method = config.quant_method  # to ask for it registers bigq with diffusers
    known.hf_quantizer = DiffusersQuantizer(config, pre_quantized=True)
    known.is_quantized = True
    known.register_to_config(quantization_config=config)
