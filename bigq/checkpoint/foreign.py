"""Checkpoints of other libraries that are no weights of a model, or quantized: refused as what they are."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bigq.checkpoint.bitsandbytes_settings import says_bitsandbytes
from bigq.checkpoint.model_config import read_config
from bigq.checkpoint.source import StoredTensor
from bigq.errors import CheckpointError
from bigq.formats.bitsandbytes import is_bitsandbytes
from bigq.system.text import shortlist

__all__ = ["FLOAT8", "foreign_method", "is_adapter", "is_scaled", "refuse_foreign"]

_METHODS = {  # quant_method in a config.json: what the format is called
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8 with scales",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "quanto": "quanto",
    "torchao": "torchao",
}
_LEAVES = {  # names of tensors that one of them writes beside its codes
    "qweight": "GPTQ or AWQ",
    "W_q": "HQQ",
}
_CODES = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu}
# Numbers by themselves where no scale is beside them: then they are a plain cast, as torch makes it.
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
_OWN = "quant_state"  # the leaf that says what weights are that this library has quantized


def refuse_foreign(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise a CheckpointError if `tensors`, the checkpoint in `folder`, are an adapter or quantized by another library.

    config.json is believed only where there are tensors that can be codes: it may stay when a model is dequantized.
    """
    if is_adapter(tensors):
        base = read_config(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        raise CheckpointError(
            f"{folder} holds a LoRA adapter{of} and no model: load the weights of the base model, "
            f"then add the adapter to it with peft's PeftModel.from_pretrained(model, {str(folder)!r})"
        )
    found = foreign_method(folder, tensors)
    if found is not None:
        raise CheckpointError(
            f"{folder} holds weights that are quantized already: {shortlist([found])}, which bigq does not read; "
            "take the original weights of the model and quantize those, or load these with transformers"
        )


def is_adapter(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether `tensors` are those of a LoRA adapter, without its model."""
    return bool(tensors) and all("lora_" in name for name in tensors)


def foreign_method(folder: Path, tensors: Mapping[str, StoredTensor]) -> str | None:
    """What the method is called by which another library has quantized `tensors`, the checkpoint in `folder`.

    None if they are not quantized, or quantized by bigq, or as bitsandbytes saves it.
    """
    leaves = {name.rpartition(".")[2] for name in tensors}
    if _OWN in leaves or is_bitsandbytes(tensors):
        return None
    found = next((method for leaf, method in _LEAVES.items() if leaf in leaves), None)
    said = read_config(folder / "config.json").get("quantization_config")
    if isinstance(said, dict) and any(stored.dtype in _CODES | FLOAT8 for stored in tensors.values()):
        method = "bitsandbytes" if says_bitsandbytes(said) else str(said["quant_method"])
        found = _METHODS.get(method, method)
    return found


def is_scaled(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a checkpoint holds a scale for its tensor `name`, which is then no number by itself."""
    module, _, leaf = name.rpartition(".")
    prefix = f"{module}." if module else ""
    beside = (f"{leaf}_scale", f"{leaf}_scale_inv", f"{leaf}.scale", f"scale_{leaf}", f"{leaf}_scales", "scale")
    return any(prefix + scale in tensors for scale in beside)
