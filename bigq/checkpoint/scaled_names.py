"""found_weights: which tensors of a checkpoint are codes with scales, by their names, dtypes and shapes."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from bigq.checkpoint.scaled_rows import E2M1, Codes
from bigq.checkpoint.source import StoredTensor

__all__ = [
    "CODE_BYTES",
    "FLOAT8",
    "MXFP4_BLOCK",
    "MXFP4_BLOCKS",
    "MXFP4_SCALES",
    "FoundWeight",
    "found_weights",
    "scale_beside",
    "scales_of_activations",
]

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"  # what follows the name of a stack of weights
MXFP4_BLOCK = 32  # elements
CODE_BYTES = {torch.uint8, torch.int8}
_ENDS = ("_scale_inv", "_scale")  # what follows the name of a weight; numbers are multiplied by either
_OF_FP8 = ("scale", "qscale_weight")  # beside a `weight`, of DeepSeek-V4 and Mistral
# More than one scale makes numbers of such a weight: zero points, columns in another order, a scale of scales.
_MORE_ENDS = ("_zero_point", "_g_idx", "_scale_2", "_global_scale")
_MORE_BESIDE = "pre_quant_scale"  # inputs are multiplied by it
# Of activations: not needed.
_BESIDE = {"input_scale", "input_zero_point", "activation_scale", "output_scale", "qscale_act"}
# Of a KV cache; one for each head, or one for all.
_OF_CACHE = {"k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point"}


class FoundWeight(NamedTuple):
    """A weight of float numbers that are codes: its name, the tensors that hold it, what a code is, and what makes it.

    `method` is what the format is called.
    """

    name: str
    stored: StoredTensor
    scale: StoredTensor
    codes: Codes
    method: str

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return self.stored.shape.numel() * (2 if self.codes == E2M1 else 1)


def found_weights(
    tensors: Mapping[str, StoredTensor], said: Mapping[str, object], held: Collection[str] = ()
) -> dict[str, FoundWeight]:
    """The weights among `tensors` that are codes with scales, and are made of these alone, by the names of their codes.

    Args:
        said: the quantization_config of config.json.
        held: names of tensors that the model has. A scale that it has itself makes no weight.
    """
    found: dict[str, FoundWeight] = {}
    for name, stored in tensors.items():
        stem = name.removesuffix(MXFP4_BLOCKS)
        if stem != name and _is_mxfp4(stored, tensors.get(stem + MXFP4_SCALES)):
            found[name] = FoundWeight(stem, stored, tensors[stem + MXFP4_SCALES], E2M1, "MXFP4")
        elif stored.dtype in FLOAT8 | CODE_BYTES and len(stored.shape) > 1:
            method = said.get("quant_method")
            scale = _scale_of(name, tensors, method)
            kind = None if scale is None else _kind(stored, scale, method)
            if scale is not None and kind is not None and scale.name not in held and not _needs_more(name, tensors):
                found[name] = FoundWeight(name, stored, scale, *kind)
    return found


def scale_beside(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """What a checkpoint calls a scale for its tensor `name`, which is then no number by itself; None without one."""
    module, _, leaf = name.rpartition(".")
    prefix = f"{module}." if module else ""
    return next((found for known in _names_of_scales(leaf) if (found := prefix + known) in tensors), None)


def _names_of_scales(leaf: str) -> tuple[str, ...]:
    """What a scale of the tensor `leaf` of a module may be called there, whoever has written it."""
    ends = ("scale", "scale_inv", "scales", "scale_2", "global_scale", "inv_scale", "descale", "dequant_scale")
    names = (f"{leaf}.scale", f"scale_{leaf}", f"qscale_{leaf}", f"{leaf}_scaling_factor", f"{leaf}s_scaling_factor")
    return *(f"{leaf}_{end}" for end in ends), *names, "scale"


def _needs_more(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether more than a scale makes numbers of the codes `name`."""
    module, _, _ = name.rpartition(".")
    beside = f"{module}.{_MORE_BESIDE}" if module else _MORE_BESIDE
    return beside in tensors or any(name + end in tensors for end in _MORE_ENDS)


def _scale_of(name: str, tensors: Mapping[str, StoredTensor], method: object) -> StoredTensor | None:
    names, stem = [name + end for end in _ENDS], name.removesuffix("weight")
    if method == "fp8" and stem != name:
        names += [stem + own for own in _OF_FP8]
    scales = [tensors[own] for own in names if own in tensors]
    is_scale = len(scales) == 1 and (scales[0].dtype.is_floating_point or scales[0].dtype == torch.uint8)
    return scales[0] if is_scale else None


def _kind(stored: StoredTensor, scale: StoredTensor, method: object) -> tuple[Codes, str] | None:
    """What the codes of a weight are, and what the format is called; None if that is not known.

    Bytes are read by what `method` is, because others store them with scales of other meanings: of "fp8" they are two
    codes of MXFP4, as some mixtures of experts have them.
    """
    if stored.dtype in FLOAT8:
        return stored.dtype, "FP8 with scales"
    if method == "fp8" and len(scale.shape) > 1 and 2 * stored.shape[-1] == scale.shape[-1] * MXFP4_BLOCK:
        return E2M1, "MXFP4"
    if method == "compressed-tensors" and stored.dtype == torch.int8:
        return torch.int8, "int8 of compressed-tensors"
    return None


def _is_mxfp4(blocks: StoredTensor, scales: StoredTensor | None) -> bool:
    """Whether these are the codes [E, N, K/32, 16] and the exponents [E, N, K/32] of a stack of weights."""
    return (
        scales is not None
        and blocks.dtype == scales.dtype == torch.uint8
        and len(blocks.shape) == 4
        and blocks.shape[-1] == MXFP4_BLOCK // 2
        and blocks.shape[:-1] == scales.shape
    )


def scales_of_activations(
    tensors: Mapping[str, StoredTensor], found: Mapping[str, FoundWeight], said: Mapping[str, object]
) -> set[str]:
    """The scales of activations beside weights of `found`, and those of a KV cache if `said` has one."""
    modules = {weight.name.rpartition(".")[0] for weight in found.values()}
    left_out = set()
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        is_beside = leaf in _BESIDE and module in modules and stored.shape.numel() == 1
        is_of_cache = leaf in _OF_CACHE and said.get("kv_cache_scheme") is not None
        if is_beside or is_of_cache:
            left_out.add(name)
    return left_out
