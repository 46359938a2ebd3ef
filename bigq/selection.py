"""Which linears of a model are quantized, and why the others are not."""

import dis
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from itertools import islice
from types import CodeType, FunctionType

from torch import nn

from bigq.errors import ConfigError
from bigq.model_tensors import ModelTree, find_owner, tensor_name

__all__ = ["Selection", "is_transposed_linear", "match_patterns", "output_head", "select_linears"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """`linears`: every name of each module to quantize; `kept`: why each other linear stays as it is."""

    linears: dict[str, tuple[str, ...]]
    kept: dict[str, str]


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is transformers' GPT-2 Conv1D, a linear that stores its weight as [K, N]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def select_linears(
    model: nn.Module,
    *,
    skip_modules: Sequence[str] = (),
    keep_in_fp32_modules: Sequence[str] = (),
    defaults: bool = True,
    tree: ModelTree | None = None,
) -> Selection:
    """Choose the modules to quantize: every `nn.Linear` by exact type and every GPT-2 Conv1D.

    Never chosen: a module that its parent does not call but whose weight it reads; what `skip_modules` or
    `keep_in_fp32_modules` match. With `defaults`, neither: the output head, weights tied to another module, and what
    the model's own `_keep_in_fp32_modules` names. One Linear under several names is one entry. `tree` is the model's,
    where the caller has it already.

    Raises:
        ConfigError: a pattern that matches nothing, or without `defaults` a choice that would break a tie.
    """
    tree = ModelTree(model) if tree is None else tree
    modules = tree.modules
    asked: dict[str, str] = {}
    for field, patterns in (("skip_modules", skip_modules), ("keep_in_fp32_modules", keep_in_fp32_modules)):
        for name, pattern in match_patterns(field, patterns, tree.names()).items():
            asked.setdefault(name, f"{field} {pattern!r}")
    own = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if defaults else ()
    tied = {name: group.names for group in tree.tensors if len(group.names) > 1 for name in group.names}
    head = output_head(model) if defaults else None

    def why_kept(module: nn.Module, aliases: tuple[str, ...]) -> str | None:
        for name in aliases if asked else ():
            for asked_for in (name, tensor_name(name, "weight")):
                if asked_for in asked:
                    return asked[asked_for]
        if module._parameters.get("weight") is None:
            return "its weight is computed from other parameters"
        if "forward" in vars(module):
            return "its forward is patched"
        if any(_read_but_not_called(modules, name) for name in aliases):
            return "its parent reads its weight directly"
        for pattern in own:
            if any(_matches(pattern, name) for name in aliases):
                return f"the model's own _keep_in_fp32_modules {pattern!r}"
        weight = tensor_name(aliases[0], "weight")
        others = sorted(n for n in tied[weight] if n.rpartition(".")[0] not in aliases) if weight in tied else []
        if others and not defaults:
            raise ConfigError(
                f"{weight} is tied to {', '.join(others)}: quantizing it would break the tie; "
                f"add {aliases[0]!r} to skip_modules, or leave skip_defaults=True"
            )
        if others:
            return f"tied to {', '.join(others)}"
        return "the output head" if module is head else None

    linears: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    for module, aliases in tree.aliases.items():
        if type(module) is nn.Linear or is_transposed_linear(module):
            reason = why_kept(module, aliases)
            if reason is None:
                linears[aliases[0]] = aliases
            else:
                kept[aliases[0]] = reason
    return Selection(linears=linears, kept=kept)


def match_patterns(field: str, patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """{name: pattern} for each of `names` that a pattern matches: itself, or an ancestor of it, on component borders.

    Raises:
        ConfigError: a pattern that matches none of `names`; it lists near ones.
    """
    matched: dict[str, str] = {}
    names = list(names) if patterns else []
    for pattern in patterns:
        hits = [name for name in names if _matches(pattern, name)]
        if not hits:
            parts = {part for name in names for part in name.split(".")}
            near = get_close_matches(pattern, [*names, *sorted(parts)], n=5, cutoff=0.5)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ConfigError(f"{field} {pattern!r} matches no module or parameter of the model{hint}")
        for name in hits:
            matched.setdefault(name, pattern)
    return matched


def _matches(pattern: str, name: str) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output head: what it says itself, or the last linear outside of every stack of blocks.

    The search goes down from the root into the last child that holds a linear, so a head behind wrappers is found, and
    ends with None at a stack: a ModuleList of blocks, or a child of the same class as an earlier sibling. A model with
    a single linear has no head.
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
        return None  # a transformers model without the head that others put on it
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


def _read_but_not_called(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether its parent reads the weight of `name` and never calls it: the parent would compute with packed codes."""
    parent, leaf = find_owner(modules, name)
    return leaf in _only_read(type(parent))  # type: ignore[arg-type]


@cache
def _only_read(kind: type[nn.Module]) -> frozenset[str]:
    """Attributes of which the methods of `kind` use `.weight` and which they never call, found in their bytecode.

    nn.MultiheadAttention's out_proj is one.
    """
    methods = [
        value.__code__
        for base in kind.__mro__
        if base not in (nn.Module, object)
        for attribute, value in vars(base).items()
        if isinstance(value, FunctionType) and attribute != "__init__"
    ]
    # Only code that has one of the names is disassembled: to disassemble all of a transformers class takes 0.3 s.
    chains = [chain for code in methods if _has_name(code, {"weight"}) for chain in _attribute_chains(code)]
    read = {first for first, *rest in chains if rest[:1] == ["weight"]}
    chains = [chain for code in methods if _has_name(code, read) for chain in _attribute_chains(code)]
    return frozenset(read - {first for first, *rest in chains if rest[:1] not in (["weight"], ["bias"])})


def _has_name(code: CodeType, names: Set[str]) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return not names.isdisjoint(code.co_names) or any(_has_name(constant, names) for constant in inner)


def _attribute_chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """('out_proj', 'weight') for each `x.out_proj.weight` in a function, nested functions included."""
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(str(instruction.argval))
        elif instruction.opname != "CACHE" and chain:
            yield tuple(chain)
            chain = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attribute_chains(constant)
