"""held_weights: which weights a checkpoint holds quantized, by whichever library, from headers and configs alone."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from bigq.checkpoint import (
    FLOAT8,
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    Source,
    StoredTensor,
    found_weights,
    read_small,
    scale_beside,
    scales_of_activations,
)
from bigq.errors import CheckpointError
from bigq.formats import Format, check_quant_state, decode_quant_state, state_name
from bigq.formats.bitsandbytes import (
    ABSMAX,
    INT8_FORMAT,
    INT8_SCALES,
    NESTED_ABSMAX,
    NESTED_MAP,
    QUANT_MAP,
    QUANT_STATES,
    flat4,
)
from bigq.planning.make_plan import quant_states

__all__ = ["HeldWeight", "held_weights", "settings_text"]

_CODES_PER_BYTE = {8: 1, 4: 2, 2: 4, 1: 8}


class HeldWeight(NamedTuple):
    """A quantized weight: its name or its module's, who made it, its format in words, and the tensors that hold it.

    `by` is "bigq", "bitsandbytes" or the name of another method. `numel` is its original number of elements, and None
    where headers and configs do not say it.
    """

    name: str
    by: str
    format: str
    numel: int | None
    members: tuple[str, ...]


def held_weights(source: Source, method: str | None, said: Mapping[str, Any]) -> list[HeldWeight]:
    """The weights that `source` holds quantized: by bigq, as bitsandbytes saves them, or by the foreign `method`.

    Args:
        source: a checkpoint. Small tensors of it are read, such as descriptions.
        method: what the method of another library is called, if it is one.
        said: the quantization_config of config.json.

    Raises:
        CheckpointError: a description of bigq or bitsandbytes is damaged.
    """
    found = [*_of_bigq(source), *_of_bitsandbytes(source)]
    if found or method is None:
        return found
    decoded = [*_of_decoded(source, method, said)]
    members = {member for weight in decoded for member in weight.members}
    return [*decoded, *(other for other in _of_others(source, method, said) if members.isdisjoint(other.members))]


def settings_text(weight_format: Format) -> str:
    """A format of bigq with its settings: "nf4, block_size=64, double_quant"."""
    settings = weight_format.describe()
    words = [str(settings.pop("format"))]
    words += [key if value is True else f"{key}={value}" for key, value in settings.items() if value is not False]
    return ", ".join(words)


def _of_bigq(source: Source) -> Iterator[HeldWeight]:
    names = quant_states(source.tensors)
    for name in names.values():
        stored = source.tensors[name]
        check_quant_state(stored.shape, stored.dtype, f"{name} in {stored.where}")
    data = read_small(source, [source.tensors[name] for name in names.values()])
    for module, name in names.items():
        encoded = torch.frombuffer(bytearray(data[name]), dtype=torch.uint8)
        described = decode_quant_state(encoded, f"{name} in {source.tensors[name].where}")
        for i, (leaf, description) in enumerate(described.items()):
            weight = f"{module}.{leaf}" if module else leaf
            members = [state_name(weight, part) for part in description.state_spec]
            members += [weight, *([name] if i == 0 else [])]  # a placeholder may have the weight's own name
            yield HeldWeight(
                weight,
                "bigq",
                settings_text(description.format),
                prod(description.shape),
                tuple(member for member in members if member in source.tensors),
            )


def _of_bitsandbytes(source: Source) -> Iterator[HeldWeight]:
    tensors = source.tensors
    flat = {name: end for name in tensors for end in QUANT_STATES if name.endswith(end)}
    said = read_small(source, [tensors[name] for name in flat if tensors[name].nbytes <= 4096])
    for name, end in flat.items():
        weight = name.removesuffix(end)
        try:
            decoded = flat4(said.get(name, b""), QUANT_STATES[end])
        except ValueError as error:
            raise CheckpointError(f"{name} in {tensors[name].where}: {error}") from error
        ends = ("", ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP, end)
        members = tuple(weight + end for end in ends if weight + end in tensors)
        yield HeldWeight(weight, "bitsandbytes", settings_text(decoded.format), prod(decoded.shape), members)
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        prefix = f"{module}." if module else ""
        if leaf == INT8_SCALES and prefix + "weight" in tensors:
            members = tuple(prefix + own for own in ("weight", INT8_SCALES, INT8_FORMAT) if prefix + own in tensors)
            yield HeldWeight(
                f"{prefix}weight", "bitsandbytes", "int8", tensors[f"{prefix}weight"].shape.numel(), members
            )


def _of_decoded(source: Source, method: str, said: Mapping[str, Any]) -> Iterator[HeldWeight]:
    """Weights in codes that a load decodes; scales of activations belong to the first weight of their module."""
    found = found_weights(source.tensors, said)
    in_module: dict[str, list[str]] = {}
    for name in scales_of_activations(source.tensors, found, said):
        in_module.setdefault(name.rpartition(".")[0], []).append(name)
    for weight in found.values():
        beside = in_module.pop(weight.name.rpartition(".")[0], [])
        name, members = weight.name.removesuffix(".weight"), (weight.stored.name, weight.scale.name, *sorted(beside))
        yield HeldWeight(name, method, weight.method, weight.numel, members)


def _of_others(source: Source, method: str, said: Mapping[str, Any]) -> Iterator[HeldWeight]:
    """Weights by the names that each method gives to their codes; what else is in their module belongs to them."""
    tensors = source.tensors
    bits = _find(said, ("bits", "w_bit", "nbits", "num_bits"))
    if bits is None and isinstance(said.get("weights"), str):  # of quanto: "int4"
        digits = "".join(filter(str.isdigit, said["weights"]))
        bits = int(digits) if digits else None
    shapes = _shapes(source)
    in_module: dict[str, list[str]] = {}
    for name in tensors:
        in_module.setdefault(name.rpartition(".")[0], []).append(name)
    words = f"{method}{f', {bits} bits' if bits else ''}"
    group = _find(said, ("group_size", "q_group_size"))
    words += f", groups of {group}" if group and group > 0 else ""
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        beside = tuple(other for other in in_module[module] if other.rpartition(".")[2] != "bias")
        stem = name.removesuffix(MXFP4_BLOCKS)
        if leaf == "qweight":
            yield HeldWeight(module, method, words, _of_columns(module, stored, tensors, bits), beside)
        elif leaf in ("W_q", "weight_packed"):
            yield HeldWeight(module, method, words, shapes.get(module) or _unpacked(stored, bits), beside)
        elif stem != name and stem + MXFP4_SCALES in tensors:
            yield HeldWeight(stem, method, words, 2 * stored.shape.numel(), (name, stem + MXFP4_SCALES))
        elif leaf == "_data" and module.endswith("weight"):
            yield HeldWeight(module, method, words, _unpacked(stored, bits), beside)
        elif stored.dtype in FLOAT8 | {torch.int8} and scale_beside(name, tensors):
            yield HeldWeight(module, method, words, stored.shape.numel(), beside)


def _shapes(source: Source) -> dict[str, int]:
    """{module: elements of its weight} where a tensor says the shape: those of HQQ and of compressed-tensors."""
    wanted = [
        stored
        for name, stored in source.tensors.items()
        if name.rpartition(".")[2] in ("shape", "weight_shape")
        and stored.dtype in (torch.int64, torch.int32)
        and len(stored.shape) == 1
        and 0 < stored.nbytes <= 64
    ]
    found = read_small(source, wanted)
    return {
        stored.name.rpartition(".")[0]: prod(
            torch.frombuffer(bytearray(found[stored.name]), dtype=stored.dtype).tolist()
        )
        for stored in wanted
    }


def _of_columns(module: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor], bits: int | None) -> int | None:
    """The elements of a weight of GPTQ or AWQ: scales have a column for each output, g_idx an entry for each input."""
    scales, order = tensors.get(f"{module}.scales"), tensors.get(f"{module}.g_idx")
    if scales is None or len(scales.shape) != 2 or len(codes.shape) != 2:
        return None
    outputs = scales.shape[1]
    if order is not None and order.shape.numel():
        return outputs * order.shape.numel()
    if codes.shape[1] < outputs:  # AWQ packs along the outputs
        return outputs * codes.shape[0]
    return codes.shape.numel() * 32 // bits if bits else None


def _unpacked(codes: StoredTensor, bits: int | None) -> int | None:
    """How many codes of `bits` a tensor of packed integers holds; None if codes do not fill its integers."""
    if codes.dtype in FLOAT8:
        return codes.shape.numel()
    return codes.nbytes * _CODES_PER_BYTE[bits] if bits in _CODES_PER_BYTE else None


def _find(said: object, names: tuple[str, ...]) -> int | None:
    """The first integer under one of `names` in nested settings."""
    pending, step = [said], 0
    while pending and step < 1000:  # settings of a file may be of any size
        step += 1
        current = pending.pop(0)
        if isinstance(current, Mapping):
            for name in names:
                if type(current.get(name)) is int:
                    return int(current[name])
            pending += current.values()
    return None
