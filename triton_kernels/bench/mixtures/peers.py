"""bitsandbytes' two ways of a mixture: linears in 4 bits (transformers), and experts that are dequantized whole too."""

import torch
from torch import nn


def linears_in_4_bits(model):
    """What transformers' BitsAndBytesConfig(load_in_4bit, nf4, compute dtype bf16) makes: all nn.Linear but the head."""
    import bitsandbytes as bnb

    count = 0
    for owner in list(model.modules()):
        for name, linear in list(owner.named_children()):
            if type(linear) is not nn.Linear or name == "lm_head":
                continue
            weight = linear.weight
            own = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=False,
                device="meta",
            )
            own.weight = bnb.nn.Params4bit(
                weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=own
            ).to(weight.device)
            own.bias = linear.bias
            setattr(owner, name, own)
            count += 1
    model.is_loaded_in_4bit = True  # by which PEFT takes its layers for bitsandbytes
    return count


def experts_in_4_bits(model):
    """Each stack of experts quantized by bitsandbytes; a read of it dequantizes it whole, so transformers multiplies
    by grouped_mm."""
    import bitsandbytes.functional as functional

    def reads(leaf):
        return property(
            lambda self: functional.dequantize_4bit(getattr(self, f"{leaf}_4bit"), getattr(self, f"{leaf}_state"))
        )

    kinds, count = {}, 0
    for module in list(model.modules()):
        kind = type(module)
        if not (hasattr(module, "num_experts") and "gate_up_proj" in module._parameters):
            continue
        for leaf in ("gate_up_proj", "down_proj"):
            packed, state = functional.quantize_4bit(module._parameters[leaf].data, quant_type="nf4")
            del module._parameters[leaf]
            module.register_buffer(f"{leaf}_4bit", packed, persistent=False)
            setattr(module, f"{leaf}_state", state)
        if kind not in kinds:
            body = {leaf: reads(leaf) for leaf in ("gate_up_proj", "down_proj")}
            kinds[kind] = type(f"Dequantized{kind.__name__}", (kind,), body)
        module.__class__ = kinds[kind]
        count += 1
    return count
