"""QuantizationConfig: what to quantize into what; every refusal of a configuration is made here."""

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from typing import Any, cast

import torch

from bigq.errors import ConfigError
from bigq.formats import FORMATS, METHODS, Format, make_format

__all__ = ["QuantizationConfig", "check_offload"]

_DTYPES = {
    name: dtype
    for dtype, names in {
        torch.float16: ("fp16", "float16", "half"),
        torch.bfloat16: ("bf16", "bfloat16"),
        torch.float32: ("fp32", "float32", "float"),
    }.items()
    for name in names
}


_FOREIGN = {  # settings of bitsandbytes' configs and others: what is written here
    "load_in_4bit": "QuantizationConfig('nf4')",
    "load_in_8bit": "QuantizationConfig('int8')",
    "bnb_4bit_quant_type": "QuantizationConfig('nf4') or QuantizationConfig('fp4')",
    "bnb_4bit_use_double_quant": "double_quant=True",
    "bnb_4bit_compute_dtype": "compute_dtype=torch.bfloat16",
    "bnb_4bit_quant_storage": "nothing (codes are uint8)",
    "llm_int8_threshold": "threshold=6.0",
    "llm_int8_skip_modules": "skip_modules=[...]",
    "llm_int8_enable_fp32_cpu_offload": "offload=torch.float32",
    "llm_int8_has_fp16_weight": "nothing (weights are quantized)",
    "modules_to_not_convert": "skip_modules=[...]",
    "torch_dtype": "dtype=torch.bfloat16",
    "quant_type": "QuantizationConfig('nf4'), QuantizationConfig('fp4') or QuantizationConfig('int8')",
    "quant_method": "QuantizationConfig('nf4'), QuantizationConfig('fp4') or QuantizationConfig('int8')",
    "bits": "QuantizationConfig('nf4') or QuantizationConfig('int8')",
    "blocksize": "block_size=64",
    "group_size": "block_size=64",
}


@dataclass(frozen=True)
class QuantizationConfig:
    """What to quantize into what. Frozen, and never changed by the library.

    Args:
        format: a format with its settings, such as `NF4(block_size=32)` or `Int8(threshold=0.0)`, or its name: "nf4",
            "fp4" or "int8".
        block_size, double_quant, threshold: settings of a format that is given by its name, in place of its defaults.
        method: how codes and scales are chosen; what is stored does not depend on it. "absmax" is the only one.
        compute_dtype: dtype of the products; None for that of the activations.
        dtype: dtype of the parameters that are not quantized, and of those that quantized weights stand for; None keeps
            each one's dtype in the checkpoint.
        skip_modules: modules not to quantize: a path ("model.layers.0"), a name ("lm_head") or a glob ("layers.*.mlp"),
            matched on component borders. A pattern that matches nothing is an error.
        skip_defaults: also skip the output head and the weights tied to another module.
        also_quantize: parameters to quantize that are not by default, by name ("experts.gate_up_proj"), or modules all
            of whose parameters of two or more dimensions are ("embed_tokens", "experts"); same patterns.
        keep_in_fp32_modules: modules kept (or made) float32 and not quantized, whatever `dtype` says; same patterns.
        cast_buffers: cast floating-point buffers to `dtype` as well; otherwise they keep theirs.
        offload: what a module on "cpu" or "disk" of a device map is stored as: "preserve" (its dtype), "quantized",
            torch.float32, or None: a custom map preserves for the 4-bit formats and quantizes for int8, an automatic
            map quantizes.

    Raises:
        ConfigError: a value that is unknown, or that contradicts another.

    Example:
        >>> QuantizationConfig("nf4", block_size=32) == QuantizationConfig(NF4(block_size=32))
        True
    """

    format: Format | str  # a Format once it is made
    _: KW_ONLY
    block_size: InitVar[int | None] = None
    double_quant: InitVar[bool | None] = None
    threshold: InitVar[float | None] = None
    method: str = "absmax"
    compute_dtype: torch.dtype | None = None
    dtype: torch.dtype | None = None
    skip_modules: tuple[str, ...] = ()
    skip_defaults: bool = True
    also_quantize: tuple[str, ...] = ()
    keep_in_fp32_modules: tuple[str, ...] = ()
    cast_buffers: bool = False
    offload: str | torch.dtype | None = None

    def __new__(cls, *args: object, **settings: object) -> "QuantizationConfig":
        _refuse_foreign(settings)
        return super().__new__(cls)

    def __post_init__(self, block_size: int | None, double_quant: bool | None, threshold: float | None) -> None:
        settings = {"block_size": block_size, "double_quant": double_quant, "threshold": threshold}
        object.__setattr__(self, "format", _format(self.format, settings))
        for name in ("skip_defaults", "cast_buffers"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected True or False")
        for name in ("skip_modules", "also_quantize", "keep_in_fp32_modules"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        for name in ("compute_dtype", "dtype"):
            object.__setattr__(self, name, _dtype(name, getattr(self, name)))
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; expected one of {list(METHODS)}")
        check_offload(self.offload)

    def weight_format(self) -> Format:
        """The format of the quantized weights."""
        return cast(Format, self.format)


def _refuse_foreign(settings: Mapping[str, object]) -> None:
    """Raise a ConfigError that says what to write where settings have the names that other libraries give them."""
    foreign = [name for name in settings if name in _FOREIGN]
    if foreign:
        said = ", ".join(f"write {_FOREIGN[name]} for {name}" for name in foreign)
        raise ConfigError(f"{', '.join(foreign)}: the settings of bigq are called otherwise: {said}")


def check_offload(value: object) -> None:
    """Refuse what is no offload policy."""
    if value not in (None, "preserve", "quantized", torch.float32):
        raise ConfigError(f"offload is {value!r}; expected None, 'preserve', 'quantized' or torch.float32")


def _format(value: object, settings: dict[str, Any]) -> Format:
    """The format that a config was given, by itself or by its name and `settings`, of which None says nothing."""
    given = {name: setting for name, setting in settings.items() if setting is not None}
    if Format in type(value).__mro__:
        for name, setting in given.items():
            raise ConfigError(f"{name}={setting!r} beside {value!r}: a format carries its own settings, pass it there")
        return cast(Format, value)
    if isinstance(value, str):
        value = value.lower()
    if not isinstance(value, str) or value not in FORMATS:
        return make_format(value)  # refuses it
    own = {field.name for field in fields(FORMATS[value])}
    for name, setting in given.items():
        if name not in own:
            raise ConfigError(f"{name}={setting!r} means nothing to format {value!r}: leave it out")
    return make_format(value, **given)


def _patterns(name: str, value: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigError(f"{name} is the string {value!r}; expected a list of them: [{value!r}]")
    if not isinstance(value, Iterable | None):
        raise ConfigError(f"{name} is {value!r}; expected a list of module paths, names or globs")
    patterns = tuple(value or ())
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern or "" in pattern.split("."):
            raise ConfigError(f"{name} holds {pattern!r}; expected a module path, a name or a glob")
    return patterns


def _dtype(name: str, value: str | torch.dtype | None) -> torch.dtype | None:
    dtype = _DTYPES.get(value.lower().removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and dtype not in _DTYPES.values():
        raise ConfigError(f"{name} is {value!r}; expected one of {sorted(_DTYPES)} or the torch dtype of that name")
    return dtype
