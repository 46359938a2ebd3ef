"""as_config: accelerate's and transformers' bitsandbytes configs as a QuantizationConfig."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bigq.config import QuantizationConfig
from bigq.errors import ConfigError
from bigq.formats import FORMATS, Format, Int8, make_format
from bigq.model.patterns import matches
from bigq.model.tree import ModelTree

__all__ = ["as_config", "is_config"]


def is_config(value: object) -> bool:
    """Whether `value` is a config of bigq, accelerate or transformers, or a format or its name.

    A string that is the path of a file is no config.
    """
    if isinstance(value, str):
        return value.lower() in FORMATS and not os.path.lexists(value)
    return _is_own(value) or _foreign(value) is not None


def as_config(value: object, model: nn.Module | None = None) -> QuantizationConfig:
    """Return `value` as a QuantizationConfig. A format, or its name, is a config with nothing else said.

    Configs of accelerate and transformers keep their own defaults. They may name modules that `model` does not have,
    as one config does for many models, so such names are left out.

    Raises:
        ConfigError: `value` is no config, or asks for something that bigq does not do.
    """
    if isinstance(value, QuantizationConfig):
        return value
    if _is_own(value) or (isinstance(value, str) and value.lower() in FORMATS):
        return QuantizationConfig(value)  # type: ignore[arg-type]
    kind = _foreign(value)
    if kind is None:
        raise ConfigError(
            f"quantization_config is {value!r}; expected a bigq.QuantizationConfig such as "
            "QuantizationConfig('nf4'), the name of a format, an accelerate BnbQuantizationConfig or a transformers "
            "BitsAndBytesConfig"
        )
    config = _from_accelerate(value) if kind == "BnbQuantizationConfig" else _from_transformers(value)
    return config if model is None else _without_absent(config, ModelTree(model))


def _without_absent(config: QuantizationConfig, tree: ModelTree) -> QuantizationConfig:
    """`config` without the patterns that match nothing in the model, which ours refuses."""
    names = list(tree.names()) if config.skip_modules or config.keep_in_fp32_modules else []
    kept = {
        field: tuple(pattern for pattern in getattr(config, field) if any(matches(pattern, name) for name in names))
        for field in ("skip_modules", "keep_in_fp32_modules")
    }
    return replace(config, **kept)  # type: ignore[arg-type]


def _is_own(value: object) -> bool:
    """Whether `value` is a config of ours, or a format with its settings."""
    return isinstance(value, QuantizationConfig) or Format in type(value).__mro__


def _foreign(value: object) -> str | None:
    # Compared by name, so that neither library has to be imported.
    for kind in type(value).__mro__:
        owner = kind.__module__.partition(".")[0]
        if (owner, kind.__name__) in {("accelerate", "BnbQuantizationConfig"), ("transformers", "BitsAndBytesConfig")}:
            return kind.__name__
    return None


def _from_accelerate(config: Any) -> QuantizationConfig:
    common = {
        "dtype": config.torch_dtype,
        "skip_modules": tuple(config.skip_modules or ()),
        "keep_in_fp32_modules": tuple(config.keep_in_fp32_modules or ()),
    }
    return _from_bitsandbytes(config, common)


def _from_transformers(config: Any) -> QuantizationConfig:
    if config.load_in_4bit and config.bnb_4bit_quant_storage != torch.uint8:
        raise ConfigError(f"bnb_4bit_quant_storage is {config.bnb_4bit_quant_storage}; bigq stores torch.uint8 only")
    if config.llm_int8_has_fp16_weight:
        raise ConfigError("llm_int8_has_fp16_weight=True keeps float16 weights: there is nothing to quantize")
    common = {
        "skip_modules": tuple(config.llm_int8_skip_modules or ()),
        "offload": torch.float32 if config.llm_int8_enable_fp32_cpu_offload else None,
    }
    return _from_bitsandbytes(config, common)


def _from_bitsandbytes(config: Any, common: dict[str, Any]) -> QuantizationConfig:
    """Make a config from the fields that both libraries have, and those in `common`."""
    if config.load_in_4bit == config.load_in_8bit:
        raise ConfigError(f"{type(config).__name__}: set exactly one of load_in_4bit and load_in_8bit")
    if config.load_in_8bit:
        return QuantizationConfig(Int8(threshold=float(config.llm_int8_threshold)), **common)
    return QuantizationConfig(
        make_format(config.bnb_4bit_quant_type, double_quant=config.bnb_4bit_use_double_quant),
        compute_dtype=config.bnb_4bit_compute_dtype,
        **common,
    )
