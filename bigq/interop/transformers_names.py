"""transformers_names: a checkpoint under the names and in the shapes that transformers gives it while it loads.

transformers 5 renames, merges and splits the tensors of some architectures, and undoes that when it saves: its models
and its files do not agree. What it does is private to it, so all that knows of it is here.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from bigq.checkpoint import Conversion, Converted, Renamed, Source, StoredTensor
from bigq.formats import NF4, QUANT_STATE, state_name
from bigq.interop.quantized_stacks import Stack, stack_conversions, weights_of_parts
from bigq.interop.transformers_model import is_transformers_model
from bigq.model.tree import ModelTree, tensor_name
from bigq.system.user_warnings import warn

__all__ = ["expected_names", "names_in_files", "rows_in_files", "with_transformers_names"]

_JOIN = {"Concatenate", "MergeModulelist"}
_MOVE_ROWS = {"Chunk", "Concatenate", "Interleave", "MergeModulelist", "PermuteForRope", "Split", "SplitModulelist"}


def with_transformers_names(tree: ModelTree, source: Source, mapping: Sequence[object] | None = None) -> Source:
    """`source` as transformers would load it into the model of `tree`; itself where all of its names fit already.

    `mapping` holds the renamings and converters that it uses; None stands for those of the model's class.

    A model of another library is left alone, and so is a source that is the model. Warns and returns `source` where the
    installed transformers does not work as those from 5.17 to 5.23 do.
    """
    if source.in_place or not is_transformers_model(tree.model):
        return source
    expected = expected_names(tree, source.tensors)
    if expected.keys() >= source.tensors.keys():
        return source
    try:
        names, conversions, stacks = _planned(tree.model, source.tensors, expected, mapping)
    except (ImportError, AttributeError, TypeError, NameError) as error:
        warn(
            f"transformers {sys.modules['transformers'].__version__} does not convert checkpoints as bigq knows it "
            f"({error}): the names of the checkpoint are taken as they are",
        )
        return source
    of_stacks, dropped = stack_conversions(source, stacks)
    conversions += of_stacks
    return Renamed(Converted(source, conversions) if conversions else source, names | dropped)


def expected_names(tree: ModelTree, tensors: Mapping[str, StoredTensor]) -> dict[str, bool]:
    """{name: True} of the tensors that a state dict of the model has, and of those that weights quantized here have."""
    expected = {name: True for group in tree.tensors if group.persistent for name in group.names}
    if any(name.rpartition(".")[2] == QUANT_STATE for name in tensors):
        parts = NF4(double_quant=True).state_spec((64, 64))  # of all formats: others have some of these
        quantized = {state_name(name, part): True for name in expected for part in parts}
        expected |= quantized | {tensor_name(module, QUANT_STATE): True for module in tree.modules}
    return expected


def rows_in_files(model: nn.Module, weights: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, range]]:
    """{weight: {name in files: its rows}} of the stacks that transformers makes of matrices when it reads a checkpoint.

    The rows of a stack [E, N, K] are numbered from 0 to E * N. A stack is left out if its matrices are not whole ranges
    of rows, and so are all of them if the installed transformers does not work as those from 5.17 to 5.23 do.

    Args:
        model: of any library.
        weights: {name: shape [E, N, K]} of stacks in it.
    """
    if not weights or not is_transformers_model(model):
        return {}
    try:
        return _separated(model, weights)
    except (ImportError, AttributeError, TypeError, NameError, ValueError):
        return {}


def names_in_files(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{name: name in files} of tensors of a transformers model that its files hold under other names.

    What transformers takes apart or puts together in files is left out.
    """
    from transformers.core_model_loading import apply_converters, apply_renamings

    converters, renamings = _reversed_mapping(model)
    renamed = {
        name: apply_renamings(name, renamings) for name in names if apply_converters(name, converters)[1] is None
    }
    return {name: new for name, new in renamed.items() if new != name}


def _separated(model: Any, weights: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, range]]:
    import torch
    from transformers.core_model_loading import apply_converters, apply_renamings

    converters, renamings = _reversed_mapping(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = {}
    for weight, (experts, rows, _) in weights.items():
        new, pattern = apply_converters(weight, converters)
        if pattern is None or not _moves_rows(by_pattern[pattern]):
            continue
        numbers = torch.arange(experts * rows).view(experts, rows, 1)
        made = _convert(model, by_pattern[pattern], new, [(weight, pattern)], [numbers])
        ranges = {apply_renamings(name, renamings): _range(part) for name, part in made.items()}
        if len(ranges) > 1 and all(ranges.values()):
            found[weight] = {name: part for name, part in ranges.items() if part is not None}
    return found


def _reversed_mapping(model: Any) -> tuple[list[Any], list[Any]]:
    """The converters and the renamings by which transformers saves a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = [entry.reverse_transform() for entry in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
    # a change of the prefix is that of a checkpoint, which this model may not come from
    renamings = [entry for entry in mapping if type(entry) is WeightRenaming]
    return [entry for entry in mapping if isinstance(entry, WeightConverter)], renamings


def _range(rows: Tensor) -> range | None:
    """Numbers [n, 1] as a range; None if they are none."""
    if rows.dim() != 2 or rows.shape[1] != 1 or not len(rows):
        return None
    start = int(rows[0, 0])
    is_range = bool((rows[1:] - rows[:-1] == 1).all())
    return range(start, start + len(rows)) if is_range else None


def _planned(
    model: Any, tensors: Mapping[str, StoredTensor], expected: dict[str, bool], mapping: Sequence[object] | None
) -> tuple[dict[str, str | None], list[Conversion], list[Stack]]:
    """{old name: new name} of what is renamed alone; what is made of tensors, and what of quantized weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if mapping is None:
        mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    names: dict[str, str | None] = {}
    merged: dict[str, list[tuple[str, str]]] = {}  # by the first new name: the members, and their patterns
    quantized: dict[str, list[tuple[str, str]]] = {}  # the same of weights whose parts the checkpoint holds
    taken: set[str] = set()
    weight_of = weights_of_parts(tensors)
    stacked: set[str] = set()
    for weight in sorted(set(weight_of.values()), key=dot_natural_key):
        new, pattern = rename_source_key(weight, renamings, converters, prefix, expected)
        if new in expected and pattern is not None:
            stacked.add(weight)
            quantized.setdefault(new, []).append((weight, pattern))
    for name in sorted([name for name in tensors if weight_of.get(name) not in stacked], key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if new not in expected and name in expected:
            new, pattern = rename_source_key(name, [], [], prefix, expected)
        if new not in expected:
            continue  # nothing waits for it: it keeps its name, by which errors call it
        if pattern is not None:
            merged.setdefault(new, []).append((name, pattern))
        elif new not in taken:
            taken.add(new)
            if new != name:
                names[name] = new
    stacks = [
        Stack(
            names=tuple(name for name, _ in members),
            convert=partial(_convert, model, by_pattern[members[0][1]], new, members),
            moves_rows=_moves_rows(by_pattern[members[0][1]]),
            floats=tuple(name for name, _ in merged.pop(new, ())),
        )
        for new, members in quantized.items()
    ]
    conversions = [
        _conversion(model, by_pattern[members[0][1]], new, members, tensors) for new, members in merged.items()
    ]
    return names, conversions, stacks


def _conversion(
    model: Any, converter: Any, new: str, members: list[tuple[str, str]], tensors: Mapping[str, StoredTensor]
) -> Conversion:
    """What `converter` of transformers makes of `members`, (name, pattern); `new` is the first of its results."""
    import torch

    convert = partial(_convert, model, converter, new, members)
    # What joins tensors has one result. Its name is found with one number of each, on the CPU: stacking 128 tensors on
    # meta takes 8 ms.
    joins = all(type(operation).__name__ in _JOIN for operation in converter.operations)
    shapes = [tensors[name].shape for name, _ in members]
    if joins and all(len(shape) > 1 for shape in shapes):
        empty = {len(shape): torch.empty([1] * len(shape)) for shape in set(shapes)}
        held = [empty[len(shape)] for shape in shapes]
    else:
        held = [torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta") for name, _ in members]
    results = tuple(convert(held))
    return Conversion(
        tuple(name for name, _ in members),
        results,
        lambda held: [made[name] for made in [convert(held)] for name in results],
        _moves_rows(converter),
        (id(converter), tuple(pattern for _, pattern in members)) if joins else None,
    )


def _moves_rows(converter: Any) -> bool:
    return all(type(operation).__name__ in _MOVE_ROWS for operation in converter.operations)


def _convert(
    model: nn.Module, converter: Any, new: str, members: list[tuple[str, str]], held: list[Tensor]
) -> dict[str, Tensor]:
    """The results by name."""
    own = deepcopy(converter)
    for (name, pattern), tensor in zip(members, held, strict=True):
        own.add_tensor(new, name, pattern, tensor)
    made: dict[str, Any] = own.convert(new, model=model, config=model.config)
    return {name: result[0] if isinstance(result, list) else result for name, result in made.items()}
