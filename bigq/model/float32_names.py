"""float32_names: the tensors that a model itself says it needs in float32."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from bigq.model.tree import ModelTree

__all__ = ["Float32Rule", "float32_names"]

_STRICT = "_keep_in_fp32_modules_strict"
_ATTRIBUTES = ("_keep_in_fp32_modules", _STRICT)


class Float32Rule(NamedTuple):
    """`pattern` of the `attribute` of a model."""

    attribute: str
    pattern: str

    def __str__(self) -> str:
        return f"the model's own {self.attribute} {self.pattern!r}"

    def is_expected_beside(self, dtype: torch.dtype) -> bool:
        """Whether the model's code is written for float32 here where other parameters are `dtype`.

        transformers heeds one attribute in a model in float16 alone, and the strict one in bfloat16 too.
        """
        return self.attribute == _STRICT or dtype == torch.float16


def float32_names(tree: ModelTree) -> dict[str, Float32Rule]:
    """{name of a tensor: the rule that says so}, by the attributes of transformers, of submodules too.

    A pattern is a module or a tensor by one or more neighbouring components of its name, below the module that says it.
    """
    rules: dict[str, Float32Rule] = {}
    kinds = {type(module) for module in tree.aliases}
    saying = {kind for kind in kinds if any(hasattr(kind, attribute) for attribute in _ATTRIBUTES)}
    for module, aliases in tree.aliases.items():  # a model may have 19,000, so most are told by their class
        if type(module) in saying or module is tree.model:
            for attribute in _ATTRIBUTES:
                _match(tree, module, aliases, attribute, rules)
    return rules


def _match(
    tree: ModelTree, module: nn.Module, aliases: Iterable[str], attribute: str, rules: dict[str, Float32Rule]
) -> None:
    patterns: Iterable[str] = getattr(module, attribute, None) or ()
    if not patterns:
        return
    one = "|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in sorted(patterns))
    search = re.compile(rf"(?:^|\.)({one})(?:\.|$)").search
    for prefix in [f"{alias}." if alias else "" for alias in aliases]:
        for group in tree.tensors:
            for name in group.names:
                found = search(name, max(len(prefix) - 1, 0)) if name.startswith(prefix) else None
                if found is not None:
                    rules.setdefault(name, Float32Rule(attribute, found[1]))
