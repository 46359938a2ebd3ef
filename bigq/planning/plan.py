"""The plan: what becomes of every tensor of a model, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bigq.formats import QUANT_STATE, Description, TensorSpec, quant_state_spec, state_name
from bigq.model.tree import tensor_name

__all__ = ["Plan", "PlannedTensor", "PlannedWeight", "WeightRef"]


class WeightRef(NamedTuple):
    """A Parameter of a module: `owners` are all names of the module, `leaf` is that of the Parameter in it.

    `described` is what the module's quant_state says, {leaf: description} of all of its quantized weights. It goes with
    the first of them, and is empty for the others.
    """

    owners: tuple[str, ...]
    leaf: str
    described: Mapping[str, Description]

    @property
    def quant_states(self) -> tuple[str, ...]:
        """All names of the module's quant_state; none where it does not go with this weight."""
        return tuple(tensor_name(owner, QUANT_STATE) for owner in self.owners) if self.described else ()


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that is loaded as it is, or cast: `names` are all of its names, `source` the checkpoint's.

    `source` is None for a tensor that the model already holds and the checkpoint does not. `is_float32_by_rule` says
    that the config or the placement makes it float32 where the model's code does not expect it.
    """

    names: tuple[str, ...]
    source: str | None
    spec: TensorSpec
    is_buffer: bool
    requires_grad: bool
    is_float32_by_rule: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """A weight that becomes a quantized one of `description`, under all of its `names`.

    `refs` are the modules that hold it; several are tied. `source` is the checkpoint's name of the float weight, None
    where the checkpoint holds it quantized. `method` is how codes and scales are chosen.
    """

    names: tuple[str, ...]
    refs: tuple[WeightRef, ...]
    description: Description
    source: str | None
    method: str = "absmax"

    def tensor_name(self, part: str) -> str:
        """The first name of the tensor that is the `part` of the quantized weight."""
        return state_name(self.names[0], part)

    def specs(self) -> dict[tuple[str, ...], TensorSpec]:
        """The tensors that it becomes, by all of their names: those of its format, and the quant_states it brings."""
        parts = self.description.state_spec
        specs = {tuple(state_name(name, part) for name in self.names): spec for part, spec in parts.items()}
        return specs | {ref.quant_states: quant_state_spec(len(ref.described)) for ref in self.refs if ref.described}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of `specs`."""
        return self.description.nbytes + sum(
            quant_state_spec(len(ref.described)).nbytes for ref in self.refs if ref.described
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`rules` says by which rule weights are quantized, `kept` why others are not, by the name of their module."""

    tensors: tuple[PlannedTensor, ...]
    weights: tuple[PlannedWeight, ...]
    kept: Mapping[str, str]
    rules: Mapping[str, str] = field(default_factory=dict)

    def weights_of_state(self) -> dict[str, tuple[str, ...]]:
        """{first name of a tensor: all names of the weight} for the tensors of weights that are held quantized."""
        return {names[0]: weight.names for weight in self.weights if weight.source is None for names in weight.specs()}

    def sizes(self) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        """(all names, bytes of each tensor) of all that the model holds; a quantized weight is one, as itself."""
        state = self.weights_of_state()
        for tensor in self.tensors:
            if tensor.names[0] not in state:
                yield tensor.names, [tensor.spec.nbytes]
        for weight in self.weights:
            yield weight.names, [spec.nbytes for spec in weight.specs().values()]
