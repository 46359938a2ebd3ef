"""Plan: what becomes of every tensor of a model, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

from torch import Tensor

from bigq.checkpoint import StoredTensor
from bigq.formats import QUANT_STATE, Description, TensorSpec, quant_state_spec, state_name
from bigq.model.tree import tensor_name

__all__ = ["Plan", "PlannedTensor", "PlannedWeight", "WeightRef"]


class WeightRef(NamedTuple):
    """A Parameter in a module: `owners` are all names of the module, and `leaf` is the name of the Parameter in it.

    `described` is {leaf: description} of all quantized weights of the module, as its quant_state holds them. It belongs
    to the first of these weights, and is empty for the others.
    """

    owners: tuple[str, ...]
    leaf: str
    described: Mapping[str, Description]

    @property
    def quant_states(self) -> tuple[str, ...]:
        """All names of the module's quant_state; none if it does not belong to this weight."""
        return tuple(tensor_name(owner, QUANT_STATE) for owner in self.owners) if self.described else ()


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that is kept, possibly in another dtype.

    `names` are all of its names in the model. `source` is its name in the checkpoint, and None if only the model has
    it. `is_float32_by_rule` says that the config or its place makes it float32 where the model's code does not expect
    it.
    """

    names: tuple[str, ...]
    source: str | None
    spec: TensorSpec
    is_buffer: bool
    requires_grad: bool
    is_float32_by_rule: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """A weight that becomes a quantized weight of this `description`.

    `names` are all of its names in the model. `refs` are the modules that hold it, several if it is tied. `source` is
    the name of the float weight in the checkpoint, and None if the checkpoint holds it quantized. `method` is how codes
    and scales are chosen, and `importance` what "search" weighs errors with, float32 [K] on the CPU.
    """

    names: tuple[str, ...]
    refs: tuple[WeightRef, ...]
    description: Description
    source: str | None
    method: str = "absmax"
    importance: Tensor | None = field(default=None, compare=False, repr=False)

    def tensor_name(self, part: str) -> str:
        """The first name of the tensor that holds this `part` of the weight."""
        return state_name(self.names[0], part)

    def specs(self) -> dict[tuple[str, ...], TensorSpec]:
        """Its tensors in the model, by all of their names: the parts, and the quant_states that belong to it."""
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
    """The plan of a load. `rules` and `kept` are the reasons why weights are quantized or kept, by module name."""

    tensors: tuple[PlannedTensor, ...]
    weights: tuple[PlannedWeight, ...]
    kept: Mapping[str, str]
    rules: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self, tensors: Mapping[str, StoredTensor]) -> str:
        """A text that two plans share if they make the same of the same `tensors` of a source."""
        told: dict[int, str] = {}  # a description stands for many weights, and to write it takes 20 us
        parts = [repr((planned.names, planned.source, planned.spec)) for planned in self.tensors]
        for weight in self.weights:
            if id(weight.description) not in told:
                told[id(weight.description)] = repr(weight.description)
            description = told[id(weight.description)]
            parts.append(repr((weight.names, weight.source, weight.method, description)))
        parts += [repr((stored.name, stored.shape, stored.dtype)) for stored in tensors.values()]
        return sha256("\n".join(parts).encode()).hexdigest()

    def weights_of_state(self) -> dict[str, tuple[str, ...]]:
        """{first name of a tensor: all names of its weight}, for weights that the checkpoint holds quantized."""
        return {names[0]: weight.names for weight in self.weights if weight.source is None for names in weight.specs()}

    def sizes(self) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        """Yield (all names, bytes of each tensor) of everything in the model; a quantized weight is one entry."""
        state = self.weights_of_state()
        for tensor in self.tensors:
            if tensor.names[0] not in state:
                yield tensor.names, [tensor.spec.nbytes]
        for weight in self.weights:
            yield weight.names, [spec.nbytes for spec in weight.specs().values()]
