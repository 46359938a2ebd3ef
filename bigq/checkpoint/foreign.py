"""Checkpoints of other libraries that are no weights of a model, or quantized: refused as what they are."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bigq.checkpoint.bitsandbytes_settings import says_bitsandbytes
from bigq.checkpoint.model_config import read_config
from bigq.checkpoint.scaled_names import FLOAT8, found_weights
from bigq.checkpoint.source import StoredTensor
from bigq.errors import CheckpointError
from bigq.formats.bitsandbytes import is_bitsandbytes
from bigq.system.text import shortlist

__all__ = ["decoded_method", "foreign_method", "is_adapter", "refuse_foreign"]

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

    None if they are not quantized, or quantized by bigq, or as bitsandbytes saves it, or in codes that are decoded.
    """
    leaves = {name.rpartition(".")[2] for name in tensors}
    if _OWN in leaves or is_bitsandbytes(tensors):
        return None
    found = next((method for leaf, method in _LEAVES.items() if leaf in leaves), None)
    said = read_config(folder / "config.json").get("quantization_config")
    is_coded = any(stored.dtype in _CODES | FLOAT8 for stored in tensors.values())
    if isinstance(said, dict) and is_coded and decoded_method(tensors, said) is None:
        method = "bitsandbytes" if says_bitsandbytes(said) else str(said["quant_method"])
        found = _METHODS.get(method, method)
    return found


def decoded_method(tensors: Mapping[str, StoredTensor], said: Mapping[str, object]) -> str | None:
    """What the format is called in which all codes of `tensors` are decoded while they are read.

    None if there is none, or other codes are among them, or `said`, the quantization_config of config.json, says that
    the weights were rotated or made sparse.
    """
    sparsity = said.get("sparsity_config")
    is_sparse = isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"
    if said.get("transform_config") or is_sparse:
        return None
    found = found_weights(tensors, said)
    known = set(found) | {weight.scale.name for weight in found.values()}
    codes = [name for name, stored in tensors.items() if stored.dtype in _CODES | FLOAT8 and len(stored.shape) > 1]
    methods = sorted({weight.method for weight in found.values()})
    return " and ".join(methods) if methods and known.issuperset(codes) else None
