"""find_blocks: the blocks of a model, such as decoder layers, and how wide the activations in one of them are."""

from typing import NamedTuple

from torch import nn

from bigq.model.experts import is_transposed
from bigq.model.tree import tensor_name
from bigq.weight.convert import is_transposed_linear

__all__ = ["Block", "LinearShape", "Widths", "find_blocks"]


class LinearShape(NamedTuple):
    """A linear, or a stack of `experts` linears, by its name: N = out_features, K = in_features."""

    name: str
    n: int
    k: int
    experts: int = 1


class Widths(NamedTuple):
    """Numbers for each token in a part of a block: all outputs of its linears, the widest one, and the widest input."""

    outputs: int
    widest_output: int
    widest_input: int


class Block(NamedTuple):
    """A block: its name, and its linears by the module that holds them, such as an attention or an MLP."""

    name: str
    parts: tuple[tuple[LinearShape, ...], ...]

    @property
    def has_experts(self) -> bool:
        """Whether it holds stacks of linears, of which some run for each token."""
        return any(linear.experts > 1 for part in self.parts for linear in part)

    def widths(self, experts_per_token: int) -> list[Widths]:
        """The widths of its parts, if `experts_per_token` linears of each stack run."""
        found = []
        for part in self.parts:
            of = [(linear.n, linear.k, 1 if linear.experts == 1 else experts_per_token) for linear in part]
            outputs, inputs = [n * count for n, _, count in of], [k * count for _, k, count in of]
            found.append(Widths(sum(outputs), max(outputs), max(inputs)))
        return found


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of the list of modules that holds the most parameters, in their order; none if there is no list."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            numel = sum(parameter.numel() for parameter in module.parameters())
            if best is None or numel > best[0]:
                best = (numel, name, module)
    if best is None:
        return []
    return [Block(f"{best[1]}.{index}", _parts(block)) for index, block in enumerate(best[2])]


def _parts(block: nn.Module) -> tuple[tuple[LinearShape, ...], ...]:
    """The linears of a block by the module that holds them."""
    parts: dict[str, list[LinearShape]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found = LinearShape(name, module.out_features, module.in_features)
        elif is_transposed_linear(module):
            k, n = module.weight.shape
            found = LinearShape(name, int(n), int(k))
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    count, n, k = parameter.shape
                    n, k = (k, n) if is_transposed(module) else (n, k)
                    parts.setdefault(name, []).append(LinearShape(tensor_name(name, leaf), n, k, count))
            continue
        parts.setdefault(name.rpartition(".")[0], []).append(found)
    return tuple(map(tuple, parts.values()))
