"""The layout "compressed-tensors": int8 weights as vLLM, SGLang and transformers read them without bigq.

They are multiplied by activations that are quantized to int8 for each token, without outlier columns.
"""

from collections.abc import Sequence

from torch import Tensor

from bigq.formats.compressed_tensors import compressed_tensors, unsupported_by_compressed_tensors
from bigq.saving.saved_weight import NO_LINEAR, SavedWeight, refuse
from bigq.saving.separated import separated

__all__ = ["LAYOUT", "check", "quantization_config", "tensors"]

LAYOUT = "compressed-tensors"


def check(weights: Sequence[SavedWeight], *, in_transformers: bool) -> None:
    """Raise an UnsupportedError unless the layout can hold all `weights`."""

    def reason(weight: SavedWeight) -> str | None:
        unsupported = unsupported_by_compressed_tensors(separated(weight)[0].description)
        return unsupported or (None if weight.is_linear or weight.rows is not None else NO_LINEAR)

    refuse(LAYOUT, weights, reason)


def tensors(weight: SavedWeight) -> dict[str, Tensor]:
    """The tensors that stand for `weight`, by name."""
    return compressed_tensors(weight.name, weight.state)


def quantization_config(weights: Sequence[SavedWeight], kept: Sequence[str]) -> dict[str, object]:
    """The `quantization_config` of config.json; `kept` are the names of linears that are not quantized."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    return {
        "config_groups": {"group_0": scheme},
        "format": "int-quantized",
        "ignore": list(kept),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
