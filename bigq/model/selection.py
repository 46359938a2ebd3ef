"""select_weights: which weights of a model are quantized, and why the others are not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from bigq.errors import ConfigError
from bigq.formats import Format, dtype_name
from bigq.model.experts import expert_weights, is_transposed, routers
from bigq.model.float32_names import float32_names
from bigq.model.patterns import is_named, match_patterns
from bigq.model.tree import ModelTree, TensorGroup, is_dense, tensor_name
from bigq.system.internals import ATTENTION_OUTPUT
from bigq.weight.convert import is_transposed_linear
from bigq.weight.own_attributes import ADDED, is_read_as_held, name_in_use

__all__ = ["Chosen", "Rule", "Selection", "candidates", "output_head", "select_weights"]


class Chosen(NamedTuple):  # a model may have 19,000 of them; making a dataclass takes a microsecond more
    """A weight to quantize: all of its names, its format, and whether its module holds it as [..., K, N].

    `rule` is the reason, as the report shows it.
    """

    names: tuple[str, ...]
    format: Format
    transposed: bool = False
    rule: str = "quantized"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """`weights`: the weights to quantize, by first name. `kept`: the reason for each weight that is kept, by module."""

    weights: dict[str, Chosen]
    kept: dict[str, str]


class Rule(NamedTuple):
    """An entry of `QuantizationConfig.rules`: its place in their order, its pattern, and its format; None: kept."""

    place: int
    pattern: str
    format: Format | None

    @property
    def reason(self) -> str:
        """Why a weight is quantized or kept, as the report shows it."""
        return f"rules {self.pattern!r}"


def select_weights(
    tree: ModelTree,
    weight_format: Format | None,
    *,
    rules: Sequence[tuple[str, Format | None]] = (),
    skip_modules: Sequence[str] = (),
    also_quantize: Sequence[str] = (),
    keep_in_fp32_modules: Sequence[str] = (),
    defaults: bool = True,
) -> Selection:
    """Choose the weights to quantize, and give a reason for each candidate that is kept.

    By default these are the weights of every nn.Linear, subclasses included, of every GPT-2 Conv1D and of the fused
    experts of transformers. `also_quantize` adds any other parameter of two or more dimensions. A weight with several
    names is one entry.

    The first of `rules` that matches a weight says its format, or that it is kept. A rule that names a parameter or its
    module, without a wildcard at its end, is obeyed as `also_quantize` is. `weight_format` is the format of all other
    weights; None: they are kept.

    Weights that `skip_modules` or `keep_in_fp32_modules` match are always kept. With `defaults`, these are kept too,
    unless `also_quantize` names them: the output head, the routers of experts, weights tied to another module, and what
    the model itself needs in float32 (see `float32_names`).

    Raises:
        ConfigError: a pattern or a rule matches nothing, a pattern of `also_quantize` matches no parameter of two or
            more dimensions, or, without `defaults`, a choice would break a tie.
    """
    names = list(tree.names()) if skip_modules or also_quantize or keep_in_fp32_modules or rules else []
    asked: dict[str, str] = {}
    for field, patterns in (("skip_modules", skip_modules), ("keep_in_fp32_modules", keep_in_fp32_modules)):
        for name, pattern in match_patterns(field, patterns, names).items():
            asked.setdefault(name, f"{field} {pattern!r}")
    named = match_patterns("also_quantize", also_quantize, names)
    first_rules = _first_rules(rules, names)
    in_float32 = float32_names(tree) if defaults else {}
    head = output_head(tree.model) if defaults else None
    choosing = set(routers(tree.aliases)) if defaults else set()
    groups = {name: group for group in tree.tensors for name in group.names}

    def why_kept(module: nn.Module, aliases: tuple[str, ...], leaf: str) -> str | None:
        for name in aliases if asked else ():
            for asked_for in (name, tensor_name(name, leaf)):
                if asked_for in asked:
                    return asked[asked_for]
        weight = module._parameters.get(leaf)
        if weight is None:
            return "its weight is computed from other parameters"
        if "forward" in vars(module):
            return "its forward is patched"
        if not is_dense(weight):
            return "its weight is not dense"
        if not weight.is_floating_point():
            return f"its weight is {dtype_name(weight.dtype)}"
        if not is_read_as_held(module, leaf):
            return f"its class gives what is read as {leaf!r}"
        taken = name_in_use(module, ADDED)
        if taken is not None:
            return f"it already has {taken!r}, an attribute of quantized modules"
        names = groups[tensor_name(aliases[0], leaf)].names
        for name in names if in_float32 else ():
            if name in in_float32:
                return str(in_float32[name])
        if len(names) == len(aliases):
            if module is head:
                return "the output head"
            return "the router of experts" if module in choosing else _why_left_alone(module)
        others = sorted(name for name in names if name.rpartition(".")[0] not in aliases)
        if not defaults:
            raise ConfigError(
                f"{names[0]} is tied to {', '.join(others)}: quantizing it would break the tie; "
                f"add {aliases[0]!r} to skip_modules, or leave skip_defaults=True"
            )
        return f"tied to {', '.join(others)}"

    weights: dict[str, Chosen] = {}
    kept: dict[str, str] = {}
    for module, aliases in tree.aliases.items():
        for leaf in candidates(module):
            reason, group = why_kept(module, aliases, leaf), groups.get(tensor_name(aliases[0], leaf))
            own_names = () if group is None else group.names  # none if the weight is computed
            rule = _rule_of(first_rules, own_names)
            chosen_format = weight_format if rule is None else rule.format
            if reason is None and chosen_format is None:
                reason = "no rule matches it" if rule is None else rule.reason
            if reason is None and chosen_format is not None:
                why = _rule(module) if rule is None else rule.reason
                weights[own_names[0]] = Chosen(own_names, chosen_format, is_transposed(module), why)
            elif reason is not None:
                kept[aliases[0]] = reason
    by_rule = _named_by_rules(tree, first_rules)
    for group in _named_matrices(tree, named, by_rule):
        skipped = [name for name in group.names if name in asked or name.rpartition(".")[0] in asked]
        rule = _rule_of(first_rules, group.names)
        chosen_format = weight_format if rule is None else rule.format
        if not skipped and group.names[0] not in weights and chosen_format is not None:
            transposed = {is_transposed(tree.modules[name.rpartition(".")[0]]) for name in group.names}
            if len(transposed) > 1:
                raise ConfigError(
                    f"{group.names[0]} is to be quantized, and is tied to {', '.join(group.names[1:])}: one module "
                    "reads it as [K, N] and another as [N, K]; leave it out of also_quantize and rules"
                )
            weights[group.names[0]] = Chosen(
                names=group.names,
                format=chosen_format,
                transposed=transposed.pop(),
                rule=f"quantized: also_quantize {named[next(name for name in group.names if name in named)]!r}"
                if rule is None
                else rule.reason,
            )
            for name in group.names:
                kept.pop(name.rpartition(".")[0], None)
    return Selection(weights=weights, kept=kept)


def candidates(module: nn.Module) -> tuple[str, ...]:
    """The parameters of `module`, none of whose weights is quantized yet, that are quantized by default."""
    if _is_linear(module):
        return ("weight",)
    return expert_weights(module)


def _why_left_alone(module: nn.Module) -> str | None:
    """Why a linear of this kind is not quantized unless the config names it."""
    if type(module) is ATTENTION_OUTPUT:
        return "part of nn.MultiheadAttention, whose fused paths need a plain weight"
    if isinstance(module, LazyModuleMixin):
        return "a lazy module, which gets another class when it is called first"
    return None


def _rule(module: nn.Module) -> str:
    """The rule by which the weight of `module` is quantized by default, as the report shows it."""
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return "quantized: a subclass of nn.Linear, which reads it in a forward of its own"
    return "quantized" if _is_linear(module) else "quantized: fused experts"


def _first_rules(rules: Sequence[tuple[str, Format | None]], names: Sequence[str]) -> dict[str, Rule]:
    """The first rule that matches each of `names`. Raises ConfigError for a rule that matches none."""
    found: dict[str, Rule] = {}
    for place, (pattern, weight_format) in enumerate(rules):
        rule = Rule(place, pattern, weight_format)
        for name in match_patterns("rules", [pattern], names):
            found.setdefault(name, rule)
    return found


def _rule_of(first_rules: Mapping[str, Rule], names: Sequence[str]) -> Rule | None:
    """The rule of a parameter with these names: the first in their order, if several match."""
    if not first_rules:
        return None
    return min((first_rules[name] for name in names if name in first_rules), default=None, key=lambda rule: rule.place)


def _named_by_rules(tree: ModelTree, first_rules: Mapping[str, Rule]) -> dict[str, str]:
    """{name: pattern} of the parameters that rules with a format name, themselves or by their module."""
    named = {}
    for group in tree.tensors if first_rules else ():
        for name in group.names:
            rule = first_rules.get(name)
            if rule is None or rule.format is None:
                continue
            if is_named(rule.pattern, name) or is_named(rule.pattern, name.rpartition(".")[0]):
                named[name] = rule.pattern
    return named


def _named_matrices(tree: ModelTree, named: Mapping[str, str], by_rule: Mapping[str, str]) -> Iterator[TensorGroup]:
    """The parameters of two or more dimensions that `also_quantize` or a rule names; both are {name: pattern}."""
    found: set[str] = set()
    for group in tree.tensors:
        hits = [of[name] for of in (named, by_rule) for name in group.names if name in of]
        tensor = group.tensor
        if hits and not group.is_buffer and tensor.dim() >= 2 and tensor.is_floating_point() and is_dense(tensor):
            found.update(hits)
            for name in group.names:
                if isinstance(tree.modules[name.rpartition(".")[0]], torch.jit.ScriptModule):
                    raise ConfigError(
                        f"{hits[0]!r} names {name}: the compiled forward of a ScriptModule reads its own "
                        "float weight; leave it out, or quantize the module that was scripted"
                    )
            yield group
    for pattern in sorted(set(named.values()) - found):
        raise ConfigError(
            f"also_quantize {pattern!r} matches no floating-point parameter of two or more dimensions that is dense"
        )


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output head: the module that the model declares, or the last linear outside of every list of blocks.

    The search starts at the root and goes into the last child that contains a linear, so it finds a head in a wrapper.
    It ends with None at a list of blocks: a ModuleList, or a child of the same class as an earlier sibling. A model
    with a single linear has no head.
    """
    own = getattr(model, "get_output_embeddings", None)
    if callable(own):
        try:
            found = own()
        except (AttributeError, NotImplementedError):
            found = None
        if isinstance(found, nn.Module):
            return found
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and not hasattr(model, prefix):
        return None  # the bare model of transformers, to which other classes add a head
    if len(list(islice(filter(_is_linear, model.modules()), 2))) < 2:
        return None
    module = model
    while not _is_linear(module):
        children = [child for child in module.children() if any(_is_linear(inner) for inner in child.modules())]
        if not children:
            return None
        last = children[-1]
        stacked = any(type(child) is type(last) for child in children[:-1])
        if not _is_linear(last) and (stacked or (isinstance(module, nn.ModuleList) and len(children) == 1)):
            return None
        module = last
    return module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed_linear(module)
