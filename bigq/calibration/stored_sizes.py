"""stored_sizes: what each weight of a model takes in each format, by the plan that a load would make."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from bigq.config import REGEX, QuantizationConfig
from bigq.errors import ConfigError
from bigq.formats import NF4, Format, Int8
from bigq.model.in_place import ModelTensors
from bigq.model.tree import ModelTree
from bigq.planning.places import plan_at
from bigq.planning.plan import Plan, PlannedWeight

__all__ = ["StoredSize", "StoredSizes", "stored_sizes"]


@dataclass(frozen=True, kw_only=True)
class StoredSize:
    """Bytes of a weight in one format: of all of its tensors, and of those without descriptions."""

    nbytes: int
    numbers_nbytes: int


@dataclass(frozen=True, kw_only=True)
class StoredSizes:
    """Sizes of the weights to choose for.

    Args:
        formats: to choose among; None: kept.
        weights: {first name of a weight: its size in each of `formats`}.
        plans: {name: how it would be quantized} for each of `formats` that is not None.
        numel: {name: how many numbers it has}.
        transposed: {name: whether its module holds it as [..., K, N]}.
        fixed: {name of another weight that is quantized: the format that a rule gives it}.
        searched: names of the weights whose scales are searched, by the config and its moments, where the format can.
        other_nbytes: of everything in the model but `weights`.
    """

    formats: tuple[Format | None, ...]
    weights: Mapping[str, tuple[StoredSize, ...]]
    plans: tuple[Mapping[str, PlannedWeight], ...]
    numel: Mapping[str, int]
    transposed: Mapping[str, bool]
    fixed: Mapping[str, Format]
    searched: frozenset[str]
    other_nbytes: int
    _tree: ModelTree = field(repr=False)

    @property
    def must_quantize(self) -> bool:
        """Whether at least one weight has to be quantized: a load refuses a config that quantizes nothing."""
        return not self.fixed

    def formats_by(self, config: QuantizationConfig) -> dict[str, Format]:
        """{name: format} of all weights that `config` quantizes."""
        return _formats(_plan(self._tree, config))

    def expected(self, chosen: Mapping[str, Format | None]) -> dict[str, Format]:
        """What `formats_by` says of a config that gives the weights the `chosen` formats."""
        return {**self.fixed, **{name: found for name, found in chosen.items() if found is not None}}

    def searches(self, chosen: Mapping[str, Format | None]) -> bool:
        """Whether a weight has its scales searched if the weights get the `chosen` formats."""
        return any("search" in found.methods for name, found in self.expected(chosen).items() if name in self.searched)

    def nbytes_by(self, config: QuantizationConfig) -> int:
        """Bytes of the whole model if it is loaded with `config`."""
        return sum(sum(sizes) for _, sizes in _plan(self._tree, config).sizes())


def stored_sizes(tree: ModelTree, config: QuantizationConfig, formats: Sequence[Format | None]) -> StoredSizes:
    """The sizes of the weights that `config` would quantize and none of its rules match.

    The dtypes of the parameters are assumed to be those of the checkpoint.

    Raises:
        ConfigError: the rules of `config` match every weight.
        UnsupportedError: the model has no weight to quantize.
    """
    plans = {found: _plan(tree, _uniform(config, found)) for found in (NF4(), Int8(), *formats) if found is not None}
    first, second = (_formats(plans[found]) for found in (NF4(), Int8()))
    free = [name for name in first if first[name] != second[name]]
    fixed = {name: found for name, found in first.items() if first[name] == second[name]}
    if not free:
        raise ConfigError("the rules of the config give every weight a format: there is none to choose for")
    if len(free) == 1 and not fixed:  # then a load would refuse a model whose only weight is kept
        formats = [found for found in formats if found is not None]
    of_format: dict[Format | None, dict[str, StoredSize]] = {
        found: _sizes(plans[found], free) for found in formats if found is not None
    }
    if None in formats:
        of_format[None] = _kept_sizes(tree, config, free, bool(fixed))
    weights = {weight.names[0]: weight for weight in plans[NF4()].weights}
    whole = sum(sum(sizes) for _, sizes in plans[NF4()].sizes())
    return StoredSizes(
        formats=tuple(formats),
        weights={name: tuple(of_format[found][name] for found in formats) for name in free},
        plans=tuple(
            {weight.names[0]: weight for weight in plans[found].weights} for found in formats if found is not None
        ),
        numel={name: prod(weights[name].description.shape) for name in free},
        transposed={name: weights[name].description.transposed for name in free},
        fixed=fixed,
        searched=frozenset(name for name, weight in weights.items() if weight.method == "search"),
        other_nbytes=whole - sum(size.nbytes for size in _sizes(plans[NF4()], free).values()),
        _tree=tree,
    )


def _uniform(config: QuantizationConfig, found: Format) -> QuantizationConfig:
    """`config` with the format `found` for every weight without a rule, by the method of `config` if it knows it."""
    if config.method in found.methods:
        return replace(config, format=found)
    return replace(config, format=found, method="absmax", moments=None)


def _plan(tree: ModelTree, config: QuantizationConfig) -> Plan:
    return plan_at(tree, ModelTensors(tree.model), config, {"": "cpu"}, None)


def _formats(plan: Plan) -> dict[str, Format]:
    return {weight.names[0]: weight.description.format for weight in plan.weights}


def _sizes(plan: Plan, names: Sequence[str]) -> dict[str, StoredSize]:
    """Sizes of quantized weights."""
    found = {weight.names[0]: weight for weight in plan.weights}
    return {
        name: StoredSize(nbytes=found[name].nbytes, numbers_nbytes=found[name].description.nbytes) for name in names
    }


def _kept_sizes(
    tree: ModelTree, config: QuantizationConfig, names: Sequence[str], others: bool
) -> dict[str, StoredSize]:
    """Sizes of the same weights if they are kept. Where no `others` are quantized, a plan has to quantize one."""
    config = replace(config, format=NF4(), method="absmax", moments=None)  # which do not matter for sizes
    plain = replace(config, format=None) if others else None
    sizes: dict[str, int] = {}
    for alone in names[:2]:
        rules = (*config.ordered_rules(), (f"{REGEX}{re.escape(alone)}", NF4()))
        plan = _plan(tree, plain or replace(config, format=None, rules=rules))
        for tensor in plan.tensors:
            sizes.setdefault(tensor.names[0], tensor.spec.nbytes)
    return {name: StoredSize(nbytes=sizes[name], numbers_nbytes=sizes[name]) for name in names}
