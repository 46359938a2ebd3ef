"""The plan: what becomes of every tensor of a model, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

from bigq.formats import Description, TensorSpec
from bigq.model_tensors import tensor_name

__all__ = ["Job", "Plan", "PlannedLinear", "PlannedTensor"]


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that is loaded as it is, or cast: `names` are all of its names, `source` the checkpoint's.

    `source` is None for a tensor that the model already holds and the checkpoint does not. `is_float32_by_rule` says
    that the config or the placement makes it float32 where its neighbours may not be.
    """

    names: tuple[str, ...]
    source: str | None
    spec: TensorSpec
    is_buffer: bool
    requires_grad: bool
    is_float32_by_rule: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedLinear:
    """A linear that becomes a QuantizedLinear of `description` under each of `names`.

    `source` is the checkpoint's name of the weight to quantize, None where the checkpoint holds it quantized.
    """

    names: tuple[str, ...]
    description: Description
    source: str | None
    transposed: bool


Job = PlannedTensor | PlannedLinear


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`kept` says why each linear that is not quantized stays as it is."""

    tensors: tuple[PlannedTensor, ...]
    linears: tuple[PlannedLinear, ...]
    kept: Mapping[str, str]

    def specs(self) -> dict[tuple[str, ...], TensorSpec]:
        """Shape and dtype of every tensor of the loaded model, by all of its names."""
        specs = {tensor.names: tensor.spec for tensor in self.tensors}
        for linear in self.linears:
            if linear.source is not None:
                for leaf, spec in linear.description.state_spec.items():
                    specs[tuple(tensor_name(name, leaf) for name in linear.names)] = spec
        return specs

    def jobs(self) -> dict[str, Job]:
        """What to do with each tensor of the checkpoint, by the checkpoint's name for it."""
        jobs: tuple[Job, ...] = (*self.tensors, *self.linears)
        return {job.source: job for job in jobs if job.source is not None}
