"""QuantizationConfig: which weights to quantize, and into which format. All checks of a configuration are here."""

import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field, fields
from importlib import import_module
from typing import Any, cast

import torch

from bigq.errors import ConfigError
from bigq.formats import FORMATS, METHODS, Format, InputMoments, dtype_name, make_format

__all__ = ["REGEX", "QuantizationConfig", "Rules", "check_offload"]

Rules = tuple[tuple[str, Format | None], ...]  # pattern and format, in their order; None: kept
REGEX = "re:"  # before a pattern that is a regular expression

_DTYPES = {
    name: dtype
    for dtype, names in {
        torch.float16: ("fp16", "float16", "half"),
        torch.bfloat16: ("bf16", "bfloat16"),
        torch.float32: ("fp32", "float32", "float"),
    }.items()
    for name in names
}


class _Method(str):
    """The quant_method of a config.json. diffusers reads `value`, because it knows enums only."""

    @property
    def value(self) -> str:
        return str(self)


_METHOD = _Method("bigq")
_INTEGRATIONS = {  # by the module that has to be there: what registers bigq with its library
    "transformers.quantizers.auto": "bigq.integrations.transformers",
    "diffusers.quantizers.auto": "bigq.integrations.diffusers",
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
    """Which weights to quantize, and into which format. Frozen: the library never changes it.

    A pattern of `skip_modules`, `also_quantize` and `keep_in_fp32_modules` is a path ("model.layers.0"), a name
    ("lm_head"), a glob ("layers.*.mlp") or, after "re:", a regular expression of a whole name ("re:.*[kv]_proj"). A
    glob matches whole components of a name. Everything below what a pattern matches is matched too. `rules` have the
    same patterns.

    Args:
        format: a format with its settings, such as `NF4(block_size=32)` or `Int8(threshold=0.0)`, or a name: "nf4",
            "fp4" or "int8".
            None: only weights that `rules` give a format are quantized.
        rules: {pattern: format, its name, or None}, in their order: the first whose pattern matches a weight says its
            format, or that it is kept. A rule that names a parameter or its module, such as "lm_head", also quantizes
            what is kept by default; one that ends with a wildcard, such as "layers.*", does not.
        block_size: weights of a row that share a scale, with "nf4" and "fp4": a power of two, 32 to 4096. None: 64.
        double_quant: whether the scales are quantized too, with "nf4" and "fp4". None: False.
        threshold: with "int8", the magnitude from which on a column of the activations is an outlier column, which is
            multiplied in the dtype of the activations. None: 6.0.
        method: how the scales of 4-bit weights are chosen. "absmax": the largest magnitude of a block. "search": the
            scale that loses least where `moments` says that the weight's inputs are large. A file of it has the same
            size and layout. Weights in int8, and those without moments, have "absmax".
        moments: with "search", what `input_moments` measured, or the path of a file that its `save` wrote. It is no
            part of a saved config: a checkpoint that is quantized already needs none.
        compute_dtype: dtype of products with quantized weights: float16, bfloat16 or float32, as a torch.dtype or its
            name. None: the dtype of the activations.
        dtype: dtype of the parameters that are not quantized, and the dtype that a quantized `module.weight` reports;
            same values. None: each tensor's dtype in the checkpoint.
        skip_modules: patterns of modules and parameters that are not quantized.
        skip_defaults: also skip the output head, and weights that are tied to another module.
        also_quantize: patterns of parameters that are quantized in addition to the default ones, such as
            "experts.gate_up_proj". A pattern that matches a module, such as "embed_tokens", stands for all parameters
            of two or more dimensions in it.
        keep_in_fp32_modules: patterns of modules that are not quantized and become float32, whatever `dtype` says.
        cast_buffers: also cast floating-point buffers to `dtype`. False: they keep their dtype.
        offload: how weights on "cpu" and "disk" are stored: "preserve" (not quantized), "quantized", or torch.float32
            (not quantized). None: "quantized" in an automatic device map; in one that you wrote, "preserve" for the
            4-bit formats and "quantized" for int8.

    Raises:
        ConfigError: a value is unknown, or contradicts another. A pattern that matches nothing in the model is an error
            of the load.

    Example:
        >>> from bigq import NF4, QuantizationConfig
        >>> QuantizationConfig("nf4", block_size=32) == QuantizationConfig(NF4(block_size=32))
        True
        >>> QuantizationConfig("int8", skip_modules=["lm_head"], compute_dtype="bf16").compute_dtype
        torch.bfloat16
    """

    format: Format | str | None = None  # always a Format or None once the config is made
    _: KW_ONLY
    rules: Rules | Mapping[str, Format | str | None] = ()  # always Rules once the config is made
    block_size: InitVar[int | None] = None
    double_quant: InitVar[bool | None] = None
    threshold: InitVar[float | None] = None
    method: str = "absmax"
    moments: InputMoments | str | os.PathLike[str] | None = field(default=None, compare=False, repr=False)
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
        object.__setattr__(self, "rules", _rules(self.rules))
        if self.format is None:
            _refuse_without_format(self.rules, settings)
        else:
            object.__setattr__(self, "format", _format(self.format, settings))
        for name in ("skip_defaults", "cast_buffers"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected True or False")
        for name in ("skip_modules", "also_quantize", "keep_in_fp32_modules"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        for name in ("compute_dtype", "dtype"):
            object.__setattr__(self, name, _dtype(name, getattr(self, name)))
        self._check_method()
        check_offload(self.offload)

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; expected one of {list(METHODS)}")
        if self.method != "absmax" and not any(self.method in asked.methods for asked in self.formats()):
            named = ", ".join(asked.name for asked in self.formats()) or "weights that are kept"
            raise ConfigError(f"method={self.method!r} means nothing to {named}: leave it out")
        if self.moments is not None and self.method != "search":
            raise ConfigError(f"moments beside method={self.method!r}: pass method='search', or leave them out")
        if isinstance(self.moments, (str, os.PathLike)):
            object.__setattr__(self, "moments", InputMoments.load(self.moments))
        elif not isinstance(self.moments, InputMoments | None):
            kind = type(self.moments).__name__
            raise ConfigError(f"moments is a {kind}; expected bigq.InputMoments, or the path of a file of them")

    def required_moments(self) -> InputMoments:
        """The moments of a config whose method is "search".

        Raises:
            ConfigError: it has none.
        """
        if not isinstance(self.moments, InputMoments):
            raise ConfigError(
                f"method={self.method!r} needs to know how large the inputs of the weights are: pass "
                "moments=bigq.input_moments(model) of the model with float or int8 weights, or the path of a file that "
                "its save wrote"
            )
        return self.moments

    def weight_format(self) -> Format | None:
        """The format of quantized weights that no rule matches; None: they are kept."""
        return cast("Format | None", self.format)

    def ordered_rules(self) -> Rules:
        """The (pattern, format) of each rule, in their order."""
        return cast(Rules, self.rules)

    def formats(self) -> tuple[Format, ...]:
        """Every format that the config asks for, once: first that of weights without a rule."""
        asked = (self.weight_format(), *(weight_format for _, weight_format in self.ordered_rules()))
        return tuple(dict.fromkeys(weight_format for weight_format in asked if weight_format is not None))

    @property
    def quant_method(self) -> str:
        """ "bigq": the name by which transformers and diffusers find what loads a model with this config.

        They ask for it in `from_pretrained`, and bigq registers itself there then. Raises an ImportError if the library
        that asks is of a release for which there is no integration; the other library may be of any release.
        """
        # A frame in a variable would be a cycle, which keeps all callers and what they hold: in a load, old weights.
        asking = str(getattr(getattr(inspect.currentframe(), "f_back", None), "f_globals", {}).get("__name__"))
        for module, integration in _INTEGRATIONS.items():
            try:
                if module in sys.modules:
                    import_module(integration)
            except ImportError:
                if asking.partition(".")[0] == module.partition(".")[0]:
                    raise
        return _METHOD

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can hold it, with the key "quant_method"; config.json of a saved model holds this.

        Example:
            >>> from bigq import QuantizationConfig
            >>> saved = QuantizationConfig("nf4", compute_dtype="bf16").to_dict()
            >>> saved["quant_method"], saved["format"], saved["block_size"], saved["compute_dtype"]
            ('bigq', 'nf4', 64, 'bfloat16')
            >>> QuantizationConfig.from_dict(saved) == QuantizationConfig("nf4", compute_dtype="bf16")
            True
        """
        apart = ("format", "rules", "moments")
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in apart}
        values = {name: dtype_name(v) if isinstance(v, torch.dtype) else v for name, v in own.items()}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        # a list: transformers sorts the keys of what it saves
        described = [[pattern, None if rule is None else rule.describe()] for pattern, rule in self.ordered_rules()]
        default = self.weight_format()
        settings = {"format": None} if default is None else default.describe()
        return {"quant_method": str(_METHOD), **settings, "rules": described, **values, **lists}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "QuantizationConfig":
        """The config that `to_dict` gave.

        Raises:
            ConfigError: it is the config of another library, or a value or a name is unknown.
        """
        settings = dict(saved)
        method = settings.pop("quant_method", None)
        if method != _METHOD:
            raise ConfigError(f"quant_method is {method!r}; expected {_METHOD!r}")
        known = {*inspect.signature(cls.__init__).parameters} - {"self"}
        unknown = sorted(settings.keys() - known)
        if unknown or "format" not in settings:
            raise ConfigError(
                f"the saved config has {unknown} that this bigq does not know" if unknown else "it names no format"
            )
        if settings.get("offload") == "float32":
            settings["offload"] = torch.float32
        settings["rules"] = _rules_from(settings.get("rules", []))
        return cls(settings.pop("format"), **settings)


def _refuse_foreign(settings: Mapping[str, object]) -> None:
    """Raise a ConfigError that says what to write where settings have the names that other libraries give them."""
    foreign = [name for name in settings if name in _FOREIGN]
    if foreign:
        said = ", ".join(f"write {_FOREIGN[name]} for {name}" for name in foreign)
        raise ConfigError(f"{', '.join(foreign)}: the settings of bigq are called otherwise: {said}")


def check_offload(value: object) -> None:
    """Raise a ConfigError unless `value` is a value of `QuantizationConfig.offload`."""
    if value not in (None, "preserve", "quantized", torch.float32):
        raise ConfigError(f"offload is {value!r}; expected None, 'preserve', 'quantized' or torch.float32")


def _format(value: object, settings: dict[str, Any]) -> Format:
    """The format that `value` is or names; a setting that is None has its default."""
    given = {name: setting for name, setting in settings.items() if setting is not None}
    if Format in type(value).__mro__:
        for name, setting in given.items():
            raise ConfigError(f"{name}={setting!r} beside {value!r}: a format carries its own settings, pass it there")
        return cast(Format, value)
    if isinstance(value, str):
        value = value.lower()
    if not isinstance(value, str) or value not in FORMATS:
        return make_format(value)  # refuses it
    own = {setting.name for setting in fields(FORMATS[value])}
    for name, setting in given.items():
        if name not in own:
            raise ConfigError(f"{name}={setting!r} means nothing to format {value!r}: leave it out")
    return make_format(value, **given)


def _rules(value: object) -> Rules:
    """Rules as pairs of a pattern and a format or None."""
    pairs = value.items() if isinstance(value, Mapping) else value
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise ConfigError(f"rules is {value!r}; expected {{pattern: format}}")
    found: dict[str, Format | None] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ConfigError(f"rules holds {pair!r}; expected {{pattern: format}}")
        pattern, rule = pair
        _patterns("rules", (pattern,))
        found[pattern] = None if rule is None else _format(rule, {})
    return tuple(found.items())


def _rules_from(saved: object) -> Rules:
    """The rules of a config that `to_dict` made."""
    rules: list[tuple[str, Format | None]] = []
    for pair in saved if isinstance(saved, list) else [saved]:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], Mapping | None):
            raise ConfigError(f"rules holds {pair!r}; expected a list of a pattern and settings of a format, or null")
        pattern, settings = pair[0], None if pair[1] is None else dict(pair[1])
        rules.append((pattern, None if settings is None else make_format(settings.pop("format", None), **settings)))
    return tuple(rules)


def _refuse_without_format(rules: object, settings: Mapping[str, object]) -> None:
    given = [f"{name}={setting!r}" for name, setting in settings.items() if setting is not None]
    if given:
        raise ConfigError(f"{given[0]} without a format: pass the format, such as 'nf4'")
    if not rules:
        raise ConfigError(f"a config needs a format or rules: {', '.join(map(repr, FORMATS))}")


def _patterns(name: str, value: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigError(f"{name} is the string {value!r}; expected a list of them: [{value!r}]")
    if not isinstance(value, Iterable | None):
        raise ConfigError(f"{name} is {value!r}; expected a list of module paths, names or globs")
    patterns = tuple(value or ())
    for pattern in patterns:
        if isinstance(pattern, str) and pattern.startswith(REGEX):
            try:
                re.compile(pattern.removeprefix(REGEX))
            except re.error as error:
                raise ConfigError(f"{name} holds {pattern!r}, which is no regular expression: {error}") from error
        elif not isinstance(pattern, str) or not pattern or "" in pattern.split("."):
            raise ConfigError(f"{name} holds {pattern!r}; expected a module path, a name, a glob or 're:...'")
    return patterns


def _dtype(name: str, value: str | torch.dtype | None) -> torch.dtype | None:
    dtype = _DTYPES.get(value.lower().removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and dtype not in _DTYPES.values():
        raise ConfigError(f"{name} is {value!r}; expected one of {sorted(_DTYPES)} or the torch dtype of that name")
    return dtype
