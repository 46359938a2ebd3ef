"""quantized_stacks: weights that a checkpoint holds quantized one by one, such as experts, and a model holds in one.

transformers stacks and concatenates floats. Codes and scales belong to rows, so whatever puts whole rows in another
order does to them what it does to floats, and nothing is quantized again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bigq.checkpoint import Conversion, Source, StoredTensor, read_small
from bigq.errors import CheckpointError
from bigq.formats import QUANT_STATE, Block4, Description, decode_quant_state, encode_quant_state, state_name
from bigq.formats.base import as_bits
from bigq.model.tree import tensor_name
from bigq.system.text import shortlist

__all__ = ["Stack", "stack_conversions", "weights_of_parts"]

_PACKED = "_packed"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Weights of a checkpoint that transformers makes into others.

    Args:
        names: of the weights, in order.
        convert: makes {name in the model: tensor} of tensors in the order of `names`.
        moves_rows: whether it does nothing but put whole rows in another order.
        floats: tensors that are not quantized and would go into the same weights.
    """

    names: tuple[str, ...]
    convert: Callable[[list[Tensor]], dict[str, Tensor]]
    moves_rows: bool
    floats: tuple[str, ...] = ()


def weights_of_parts(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """{name of a tensor: name of its weight} for the parts and the quant_states of weights alone in their modules."""
    held: dict[str, list[str]] = {  # by module: the last parts of the names
        name.rpartition(".")[0]: [] for name in tensors if name.rpartition(".")[2] == QUANT_STATE
    }
    for name in tensors if held else ():
        module, _, leaf = name.rpartition(".")
        if module in held:
            held[module].append(leaf)
    found: dict[str, str] = {}
    for module, own in held.items():
        weights = [leaf.removesuffix(_PACKED) for leaf in own if leaf.endswith(_PACKED)]
        if len(weights) == 1:
            parts = [leaf for leaf in own if leaf == QUANT_STATE or leaf.startswith(f"{weights[0]}_")]
            found |= {tensor_name(module, part): tensor_name(module, weights[0]) for part in parts}
    return found


def stack_conversions(source: Source, stacks: Sequence[Stack]) -> tuple[list[Conversion], dict[str, None]]:
    """What makes the parts and quant_states of `stacks`, and {name: None} of the quant_states that nobody needs then.

    Double quantization has one offset for a weight, and blocks of 256 scales that do not end with it. So the scales of
    a stack are decoded, which changes no number.

    Raises:
        CheckpointError: weights of a stack are not quantized alike, some are floats, or rows would be taken apart.
    """
    described = _descriptions(source, stacks)
    conversions: list[Conversion] = []
    problems: list[str] = []
    by_module: dict[str, dict[str, Description]] = {}
    members: dict[str, list[str]] = {}  # the quant_states behind those of `by_module`
    for stack in stacks:
        try:
            first = _common(stack, [described[name] for name in stack.names])
            shapes = _shapes(stack, [described[name].shape for name in stack.names])
        except ValueError as error:
            problems.append(str(error))
            continue
        conversions += _part_conversions(stack, first, list(shapes))
        plain = replace(first.format, double_quant=False) if isinstance(first.format, Block4) else first.format
        for name, shape in shapes.items():
            module, _, leaf = name.rpartition(".")
            by_module.setdefault(module, {})[leaf] = replace(first, format=plain, shape=shape)
            members.setdefault(module, []).extend(_quant_state_of(name) for name in stack.names)
    if problems:
        raise CheckpointError(
            "the checkpoint holds weights quantized one by one, which the model holds in one, and they do not fit "
            f"together: {shortlist(problems, limit=5)}; load the original weights, with a quantization_config"
        )
    kept_of: dict[str, str] = {}  # of the quant_states behind a module, the one that becomes its own
    by_kept: dict[str, dict[str, dict[str, Description]]] = {}  # several modules, if rows are split between them
    for module, weights in by_module.items():
        states = members[module]
        kept = next((kept_of[name] for name in states if name in kept_of), states[0])
        for name in states:
            kept_of.setdefault(name, kept)
        by_kept.setdefault(kept, {})[module] = weights
    for kept, made in by_kept.items():
        names = tuple(tensor_name(module, QUANT_STATE) for module in made)
        conversions.append(Conversion((kept,), names, partial(_encoded, list(made.values()))))
    dropped = {name: None for name, kept in kept_of.items() if name != kept}
    return conversions, dropped


def _quant_state_of(weight: str) -> str:
    return tensor_name(weight.rpartition(".")[0], QUANT_STATE)


def _descriptions(source: Source, stacks: Sequence[Stack]) -> dict[str, Description]:
    """The description of each weight of `stacks`, by its name."""
    names = [name for stack in stacks for name in stack.names]
    stored = {name: source.tensors[_quant_state_of(name)] for name in names}
    read = read_small(source, list(stored.values()))
    decoded: dict[bytes, dict[str, Description]] = {}  # most of 18,000 experts are alike
    found: dict[str, Description] = {}
    for name, tensor in stored.items():
        data = read[tensor.name]
        if data not in decoded:
            quant_state = torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)
            decoded[data] = decode_quant_state(quant_state, f"{tensor.name} in {tensor.where}")
        leaf = name.rpartition(".")[2]
        if leaf not in decoded[data]:
            raise CheckpointError(f"{tensor.name} in {tensor.where} does not describe {leaf!r}, whose codes are there")
        found[name] = decoded[data][leaf]
    return found


def _common(stack: Stack, descriptions: Sequence[Description]) -> Description:
    """The description of all weights of `stack`, but for their shapes. Raises a ValueError if there is no such."""
    first = descriptions[0]
    if stack.floats:
        raise ValueError(f"{stack.names[0]} is quantized, and {shortlist(stack.floats, limit=1)} is not")
    for name, description in zip(stack.names, descriptions, strict=True):
        if replace(description, shape=first.shape) != first:
            raise ValueError(f"{stack.names[0]} is {_words(first)}, and {name} is {_words(description)}")
    if not stack.moves_rows or first.transposed:
        raise ValueError(f"transformers takes rows of {stack.names[0]} apart, whose scales belong to whole rows")
    return first


def _shapes(stack: Stack, shapes: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{name in the model: shape} of what `stack` becomes. Raises a ValueError if it cannot be made of whole rows."""
    columns = {shape[-1] for shape in shapes}
    if len(columns) > 1:
        raise ValueError(f"{stack.names[0]} and others have rows of different lengths: {sorted(columns)}")
    try:
        rows = stack.convert([torch.zeros((*shape[:-1], 1), dtype=torch.uint8) for shape in shapes])
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{stack.names[0]} and others cannot be put together: {error}") from error
    if any(tensor.shape[-1] != 1 for tensor in rows.values()):
        raise ValueError(f"transformers takes rows of {stack.names[0]} apart, whose scales belong to whole rows")
    return {name: (*tensor.shape[:-1], *columns) for name, tensor in rows.items()}


def _part_conversions(stack: Stack, description: Description, names: Sequence[str]) -> Iterator[Conversion]:
    """What makes the parts of the weights `names` of those of `stack`."""
    weight_format = description.format
    is_nested = isinstance(weight_format, Block4) and weight_format.double_quant
    scales = ("absmax", "nested_absmax", "nested_offset") if is_nested else ("absmax",)
    for result, parts in (("packed", ("packed",)), ("absmax", scales)):
        yield Conversion(
            tuple(state_name(name, part) for name in stack.names for part in parts),
            tuple(state_name(name, result) for name in names),
            partial(_converted, stack, names, partial(_decoded, description) if len(parts) > 1 else None, len(parts)),
            moves_rows=len(parts) == 1,
        )


def _converted(
    stack: Stack,
    names: Sequence[str],
    decode: Callable[..., Tensor] | None,
    count: int,
    held: list[Tensor],
) -> list[Tensor]:
    """One part of all `names`, of `count` tensors for each weight of `stack`."""
    each = [held[start : start + count] for start in range(0, len(held), count)]
    made = stack.convert([tensors[0] if decode is None else decode(*tensors) for tensors in each])
    return [made[name] for name in names]


def _decoded(description: Description, absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """Scales of double quantization as those of one without it."""
    if absmax.is_meta:
        return torch.empty(absmax.shape, dtype=torch.int32, device="meta")
    state = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    return as_bits(description.format.scales(state))


def _encoded(modules: Sequence[Mapping[str, Description]], held: list[Tensor]) -> list[Tensor]:
    return [encode_quant_state(weights) for weights in modules]


def _words(description: Description) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in description.format.describe().items())
    return f"{settings}, {description.dtype}, computed in {description.compute_dtype}"
