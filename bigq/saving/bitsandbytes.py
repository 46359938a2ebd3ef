"""The layout "bitsandbytes": the tensors and the config.json that transformers writes for a model of bitsandbytes."""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from bigq.errors import UnsupportedError
from bigq.formats.bitsandbytes import bitsandbytes_settings, bitsandbytes_tensors, unsupported_by_bitsandbytes
from bigq.saving.saved_weight import NO_LINEAR, SavedWeight, refuse
from bigq.saving.separated import separated

__all__ = ["LAYOUT", "check", "quantization_config", "tensors"]

LAYOUT = "bitsandbytes"


def check(weights: Sequence[SavedWeight], *, in_transformers: bool) -> None:
    """Raise an UnsupportedError unless files of bitsandbytes, and one config.json, can hold all `weights`.

    transformers gives bitsandbytes' classes to no subclass of nn.Linear.
    """

    def reason(weight: SavedWeight) -> str | None:
        is_alone = weight.rows is None and not weight.is_conv1d
        if is_alone and not weight.is_linear:
            return NO_LINEAR
        if is_alone and in_transformers and weight.kind is not nn.Linear:
            return f"transformers leaves {weight.kind.__name__} alone"
        return unsupported_by_bitsandbytes(separated(weight)[0].description)

    refuse(LAYOUT, weights, reason)
    said: dict[str, str] = {}  # the block size is no part of it: the JSON of each weight says it
    for weight in weights:
        settings = {name: value for name, value in weight.description.format.describe().items() if name != "block_size"}
        said.setdefault(", ".join(f"{name} {value}" for name, value in settings.items()), weight.name)
    if len(said) > 1:
        listed = "; ".join(f"{name} has {settings}" for settings, name in said.items())
        raise UnsupportedError(
            f"the layout {LAYOUT!r} says one format for a whole model, and this one has several: {listed}; "
            "save it with layout='bigq'"
        )


def tensors(weight: SavedWeight) -> dict[str, Tensor]:
    """The tensors that stand for `weight`, by name."""
    return bitsandbytes_tensors(weight.name, weight.description, weight.state)


def quantization_config(weights: Sequence[SavedWeight], kept: Sequence[str]) -> dict[str, object]:
    """The `quantization_config` of config.json; `kept` are the names of linears that are not quantized."""
    skipped = _skipped(kept, [weight.name.rpartition(".")[0] for weight in weights])
    return bitsandbytes_settings(weights[0].description) | {"llm_int8_skip_modules": skipped or None}


def _skipped(kept: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """`kept` as patterns of transformers, which also match the ends of names: "proj" stands for "k_proj" too."""
    patterns = []
    for name in kept:
        pattern = re.compile(rf"(?:{re.escape(name)})(?:(?<=\.)|(?=\.|$))")
        is_clear = not any(other.endswith(name) or pattern.match(other) for other in quantized)
        patterns.append(name if is_clear else f"^{re.escape(name)}$")
    return patterns
