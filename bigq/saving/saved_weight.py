"""SavedWeight: a quantized weight of a model that is to be saved, with what a layout has to know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from bigq.errors import UnsupportedError
from bigq.formats import Description, State
from bigq.interop.transformers_names import rows_in_files
from bigq.model.tree import tensor_name
from bigq.system.text import shortlist
from bigq.weight.convert import is_transposed_linear, original_class
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["NO_LINEAR", "SavedWeight", "kept_linears", "quantized_weights", "refuse", "with_rows"]

NO_LINEAR = "it is not the weight of a linear, nor experts that checkpoints of this model hold as linears"


@dataclass(frozen=True, kw_only=True)
class SavedWeight:
    """A quantized weight.

    Args:
        name: its first name in the model.
        leaf: its name in its module.
        description: of it.
        state: its parts, where they are stored.
        kind: the class that its module had before it was quantized.
        tied: the name of the weight in another module that holds the same tensors; None if there is no other.
        rows: of a stack, {name: which of its rows} of the matrices that checkpoints hold in its place; None if they
            hold it whole. The rows of [E, N, K] are numbered from 0 to E * N.
    """

    name: str
    leaf: str
    description: Description
    state: State
    kind: type[nn.Module]
    tied: str | None = None
    rows: Mapping[str, range] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of an nn.Linear, a subclass included."""
        return self.leaf == "weight" and issubclass(self.kind, nn.Linear)

    @property
    def is_conv1d(self) -> bool:
        """Whether it is the weight of GPT-2's Conv1D, which is a linear too."""
        return self.leaf == "weight" and self.description.transposed and self.kind.__name__ == "Conv1D"


def quantized_weights(model: nn.Module) -> list[SavedWeight]:
    """Every quantized weight of `model` once, under its first name."""
    found: dict[int, SavedWeight] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        for leaf, description in module.descriptions.items():
            stored, own = module.stored_weight(leaf), tensor_name(name, leaf)
            key = id(stored.state["packed"])
            if key in found:
                found[key] = replace(found[key], tied=own)
                continue
            found[key] = SavedWeight(
                name=own,
                leaf=leaf,
                description=description,
                state={part: tensor.detach() for part, tensor in stored.state.items()},
                kind=original_class(module),
            )
    return list(found.values())


def with_rows(model: nn.Module, weights: Sequence[SavedWeight]) -> list[SavedWeight]:
    """`weights` of `model`, with their `rows`."""
    stacks = [weight for weight in weights if len(weight.description.shape) == 3 and not weight.description.transposed]
    rows = rows_in_files(model, {weight.name: weight.description.shape for weight in stacks})
    return [replace(weight, rows=rows.get(weight.name)) for weight in weights]


def kept_linears(model: nn.Module) -> list[str]:
    """The names of the linears of `model` that are not quantized, under all of their names.

    A router of experts is among them: other releases of transformers, and other libraries, have a linear in its place.
    """
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, QuantizedModule) and _is_linear(module)
    ]


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    is_router = weight is not None and weight.dim() == 2 and type(module).__name__.endswith("Router")
    return isinstance(module, nn.Linear) or is_transposed_linear(module) or is_router


def refuse(layout: str, weights: Sequence[SavedWeight], reason_of: Callable[[SavedWeight], str | None]) -> None:
    """Raise one UnsupportedError that names every weight that `layout` cannot hold, by what `reason_of` says of it.

    Tied weights are among them: another library ties no quantized weights after it has loaded one of them.
    """
    problems = []
    for weight in weights:
        reason = reason_of(weight) if weight.tied is None else f"it is tied to {weight.tied}"
        if reason is not None:
            problems.append(f"{weight.name}: {reason}")
    if problems:
        raise UnsupportedError(
            f"the layout {layout!r} cannot hold {len(problems)} weights of the model: {shortlist(problems, limit=5)}; "
            "quantize the model without them (skip_modules), or save it with layout='bigq'"
        )
