"""make_plan: decide what becomes of every tensor of a model, before anything is read or changed."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bigq.checkpoint import FLOAT8, StoredTensor
from bigq.config import QuantizationConfig
from bigq.errors import CheckpointError, ConfigError, UnsupportedError
from bigq.formats import QUANT_STATE, Description, encode_quant_state, state_name
from bigq.model.patterns import match_patterns
from bigq.model.selection import select_weights
from bigq.model.tree import ModelTree, TensorGroup, tensor_name
from bigq.planning.match import Match
from bigq.planning.plan import Plan, PlannedWeight, WeightRef
from bigq.planning.searched import search_weights
from bigq.system.text import shortlist
from bigq.weight.own_attributes import ADDED, is_read_as_held, name_in_use
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["Described", "make_plan", "quant_states"]

Described = Mapping[str, Mapping[str, Description]]  # by module name, then by leaf


def quant_states(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """{module name: name of its quant_state} for the modules whose weights a checkpoint holds quantized."""
    states = [name for name in tensors if name.rpartition(".")[2] == QUANT_STATE]
    return {name.rpartition(".")[0]: name for name in states}


def make_plan(
    tree: ModelTree,
    tensors: Mapping[str, StoredTensor],
    config: QuantizationConfig | None,
    *,
    quantized: Described | None = None,
    unquantized: Callable[[str], bool] = lambda name: False,
    offload_dtype: Callable[[str], torch.dtype | None] = lambda name: None,
    strict: bool = True,
    in_place: bool = False,
) -> Plan:
    """Decide what becomes of every tensor of the model in `tree`. Reads nothing and changes nothing.

    Args:
        tensors: what the checkpoint holds.
        config: None only if the checkpoint is quantized.
        quantized: descriptions of the weights that the checkpoint holds quantized, by module name and leaf.
        unquantized: whether a weight is kept because of its place, by its name.
        offload_dtype: the dtype that a tensor has because of its place, or None, by its name.
        strict: also refuse tensors that only the checkpoint has, and tensors that only the model has.
        in_place: `tensors` are those of the model, without those that are not dense.

    Raises:
        CheckpointError: tensors are missing, unexpected or have a wrong shape; one error lists all of them.
        ConfigError: `config` does not fit the model or contradicts the checkpoint.
        UnsupportedError: the model is quantized already, or has no weight to quantize, or a weight to quantize is that
            of an embedding that writes to it.
    """
    if any(isinstance(module, QuantizedModule) for module in tree.aliases):
        raise UnsupportedError("the model is quantized already: pass weights_location to load it again")
    if quantized:
        described, sources = _held_quantized(tree, tensors, quantized, config, strict)
        kept: Mapping[str, str] = {}
        rules: dict[str, str] = {}
    elif config is None:
        raise ConfigError("the checkpoint is not quantized: pass a quantization_config")
    else:
        described, sources, kept, rules = _chosen(tree, tensors, config, unquantized)
    searched = {} if quantized or config is None else search_weights(described, tree, config, rules)
    weights = _planned(tree, described, sources, searched)
    fit = Match(
        tree=tree, tensors=tensors, config=config, offload_dtype=offload_dtype, strict=strict, in_place=in_place
    )
    for weight in weights:
        fit.claim(weight)
    planned_tensors = tuple(fit.tensors_outside(weights))
    fit.refuse()
    return Plan(tensors=planned_tensors, weights=tuple(weights), kept=kept, rules=rules)


def _chosen(
    tree: ModelTree,
    tensors: Mapping[str, StoredTensor],
    config: QuantizationConfig,
    unquantized: Callable[[str], bool],
) -> tuple[dict[str, Description], dict[str, str], dict[str, str], dict[str, str]]:
    """The weights to quantize, by first name: descriptions and sources. Then why others are kept, and the rules."""
    selection = select_weights(
        tree,
        config.weight_format(),
        rules=config.ordered_rules(),
        skip_modules=config.skip_modules,
        also_quantize=config.also_quantize,
        keep_in_fp32_modules=config.keep_in_fp32_modules,
        defaults=config.skip_defaults,
    )
    groups = {group.names[0]: group for group in tree.tensors}
    kept, described, sources, rules = dict(selection.kept), {}, {}, {}
    alike: dict[tuple[object, ...], Description] = {}  # equal ones are one object, if they are read in one dtype
    for name, chosen in selection.weights.items():
        if unquantized(name):
            kept[name.rpartition(".")[0]] = "offloaded with its dtype"
            continue
        own = groups[name].tensor
        source = next(filter(tensors.__contains__, chosen.names), name)
        read = tensors[source].dtype if source in tensors else own.dtype
        found = own.dtype if read in FLOAT8 else read  # a plain cast: what it was cast from is not said
        shape = tuple(own.mT.shape if chosen.transposed else own.shape)
        key = id(chosen.format), shape, config.dtype or found, chosen.transposed, read
        if key not in alike:
            alike[key] = Description(
                format=chosen.format,
                shape=shape,
                dtype=config.dtype or found,
                compute_dtype=config.compute_dtype,
                transposed=chosen.transposed,
            )
        described[name], sources[name] = alike[key], source
        rules[name.rpartition(".")[0]] = chosen.rule
    if not selection.weights:
        raise UnsupportedError(_nothing_to_quantize(tree, kept))
    return described, sources, kept, rules


def _nothing_to_quantize(tree: ModelTree, kept: Mapping[str, str]) -> str:
    """What is said of a model without a weight to quantize: why linears are kept, and what `also_quantize` may name."""
    reasons = [f"{name}: {reason}" for name, reason in kept.items()] or [
        "it has no linear, and no experts that are known"
    ]
    others = {
        group.names[0]: group.tensor.numel()
        for group in tree.tensors
        if not group.is_buffer
        and group.tensor.is_floating_point()
        and group.tensor.dim() > 1
        and group.names[0].rpartition(".")[0] not in kept
    }
    if others:
        largest = sorted(others, key=lambda name: -others[name])
        reasons.append(f"weights that also_quantize may name: {shortlist(largest)}")
    return f"nothing to quantize in {type(tree.model).__name__}:" + "".join(f"\n  {reason}" for reason in reasons)


def _held_quantized(
    tree: ModelTree,
    tensors: Mapping[str, StoredTensor],
    quantized: Described,
    config: QuantizationConfig | None,
    strict: bool,
) -> tuple[dict[str, Description], dict[str, str]]:
    """Descriptions of the weights that the checkpoint holds quantized, by first name, and no sources.

    Those that the model does not have are left out if `strict` is False.
    """
    if config is not None:
        for field in ("skip_modules", "keep_in_fp32_modules"):
            for name, pattern in match_patterns(field, getattr(config, field), tree.names()).items():
                owner, _, leaf = name.rpartition(".")
                if name in quantized or leaf in quantized.get(owner, ()):
                    held = name if name in quantized else owner
                    raise ConfigError(f"{field} {pattern!r} matches {held}, which the checkpoint holds quantized")
    groups = {name: group for group in tree.tensors for name in group.names if not group.is_buffer}
    described: dict[str, Description] = {}
    problems: list[str] = []
    for module, weights in quantized.items():
        for leaf, description in weights.items():
            name = tensor_name(module, leaf)
            group = groups.get(name)
            if group is None and not strict:
                continue
            if group is None:
                problems.append(f"  {name} is quantized in the checkpoint, but the model has no such parameter")
                continue
            problems += _misfits(name, group, description, described.get(group.names[0]), tensors)
            if config is not None and description.format not in config.formats():
                asked = " or ".join(str(weight_format.describe()) for weight_format in config.formats())
                raise ConfigError(
                    f"{name}: the checkpoint holds {description.format.describe()}, the quantization_config asks for "
                    f"{asked}; drop the config, or quantize from the original weights"
                )
            if config is not None and config.compute_dtype is not None:
                description = replace(description, compute_dtype=config.compute_dtype)
            described[group.names[0]] = description
    if not described and not problems:
        problems.append(f"  {type(tree.model).__name__} has none of the weights that the checkpoint holds quantized")
    if problems:
        raise CheckpointError("the quantized checkpoint does not fit the model:\n" + "\n".join(problems))
    return described, {}


def _misfits(
    name: str,
    group: TensorGroup,
    description: Description,
    other: Description | None,
    tensors: Mapping[str, StoredTensor],
) -> list[str]:
    """The reasons why a weight stored as `description` cannot be the parameter of `group`; none if it can."""
    problems = []
    if tuple(group.tensor.shape) != description.weight_shape:
        found = list(description.weight_shape)
        problems.append(f"  {name}: expected shape {list(group.tensor.shape)}, found {found}")
    floats = [tied for tied in group.names if tied in tensors]
    if floats:
        problems.append(
            f"  {name} is quantized in the checkpoint, which holds {floats[0]} as floats; the model ties them"
        )
    if other is not None and replace(other, compute_dtype=description.compute_dtype) != description:
        problems.append(f"  {name} is tied to {group.names[0]}, which the checkpoint holds in another format")
    return problems


def _planned(
    tree: ModelTree,
    described: Mapping[str, Description],
    sources: Mapping[str, str],
    searched: Mapping[str, Tensor],
) -> list[PlannedWeight]:
    """Make the PlannedWeight of each description, with all modules that hold the weight.

    `searched` is the importance of the input features of each weight whose scales are searched, by its first name.
    """
    names_of = {group.names[0]: group.names for group in tree.tensors}
    in_module: dict[
        str, dict[str, Description]
    ] = {}  # descriptions in the quant_state of each module, by its first name
    holders: dict[
        str, dict[tuple[tuple[str, ...], str], None]
    ] = {}  # by weight: all names of each module that holds it, and the leaf
    for name, description in described.items():
        holders[name] = {}
        for alias in names_of[name]:
            owner, _, leaf = alias.rpartition(".")
            owners = tree.aliases[tree.modules[owner]]
            holders[name][owners, leaf] = None
            in_module.setdefault(owners[0], {})[leaf] = description
    shared: dict[tuple[object, ...], Mapping[str, Description]] = {}  # equal quant_states are one object
    quant_state_of: dict[str, Mapping[str, Description]] = {}
    for owner, weights in in_module.items():
        key = tuple((leaf, id(description)) for leaf, description in weights.items())
        if key not in shared:
            encode_quant_state(weights)  # raises if a record is too long, before anything is changed
            shared[key] = weights
        quant_state_of[owner] = shared[key]
        _refuse_names_in_use(tree.modules[owner], owner, weights)
        _refuse_renormalized(tree.modules[owner], owner)
    planned = []
    for name, description in described.items():
        refs = tuple(
            WeightRef(owners=owners, leaf=leaf, described=quant_state_of.pop(owners[0], {}))
            for owners, leaf in holders[name]
        )
        planned.append(
            PlannedWeight(
                names=names_of[name],
                refs=refs,
                description=description,
                source=sources.get(name),
                method="search" if name in searched else "absmax",
                importance=searched.get(name),
            )
        )
    return planned


def _refuse_names_in_use(module: nn.Module, name: str, weights: Mapping[str, Description]) -> None:
    """Raise a ConfigError if `module` already uses a name that it gets with one of its `weights`, or that of it."""
    kind = type(module).__name__
    for leaf, description in weights.items():
        weight = tensor_name(name, leaf)
        parts = frozenset([QUANT_STATE, *[state_name(leaf, part) for part in description.state_spec]])
        for names, what in ((parts, "a tensor of the quantized weight"), (ADDED, "an attribute of quantized modules")):
            new = name_in_use(module, names)
            if new is not None:
                raise ConfigError(
                    f"{weight} cannot be quantized: its {kind} already has {new!r}, the name of {what}; rename it, or "
                    "add the weight to skip_modules"
                )
        if not is_read_as_held(module, leaf):
            raise ConfigError(
                f"{weight} cannot be quantized: {kind} gives what is read as {leaf!r}, and that is not the Parameter "
                "of that name; add the weight to skip_modules"
            )


def _refuse_renormalized(module: nn.Module, name: str) -> None:
    """Raise an UnsupportedError if `module` renormalizes its weight: quantized again, rows have another norm."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise UnsupportedError(
            f"{name} is a {type(module).__name__} with max_norm={module.max_norm}, which renormalizes rows of its "
            "weight in each call; rows that are quantized again have another norm: do not name it in the config"
        )
