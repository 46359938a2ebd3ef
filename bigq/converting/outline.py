"""Outline: what the files of a quantized model will hold, known before a weight is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bigq.checkpoint.safetensors_file import DTYPE_NAMES
from bigq.errors import UnsupportedError
from bigq.formats import TensorSpec, dtype_name
from bigq.loading.commit import commit_tensor, commit_weight
from bigq.model.tree import ModelTree, held_tensor
from bigq.planning.plan import Plan, PlannedTensor, PlannedWeight
from bigq.saving.files import distinct
from bigq.saving.layouts import Saved, foreign_tensors, in_layout
from bigq.saving.saved_weight import SavedWeight
from bigq.system.text import shortlist

__all__ = ["Entry", "fill_with_meta", "outline_of"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one tensor of the checkpoint becomes.

    Args:
        planned: what is planned for it.
        specs: the tensors in the files, by name.
        late: names of those whose length depends on the numbers.
        names: {first name in the model: name in the files}, where the tensors of the model are saved as they are;
            otherwise {name: name in the files} of those made for a weight whose names differ.
        constants: tensors that do not depend on the checkpoint, by name.
        weight: the weight, on meta, where `layout` is that of another library.
        layout: of the files.
    """

    planned: PlannedTensor | PlannedWeight
    specs: Mapping[str, TensorSpec]
    late: frozenset[str]
    names: Mapping[str, str]
    constants: Mapping[str, Tensor]
    weight: SavedWeight | None
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the files, about: what is `late` may be a few bytes longer."""
        return sum(spec.nbytes for spec in self.specs.values())

    def tensors(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in the files, by name, of what a weight became: `held`, by first name in the model."""
        assert isinstance(self.planned, PlannedWeight)
        if self.weight is None:
            return {**{self.names[name]: tensor for name, tensor in held.items()}, **self.constants}
        state = {part: held[self.planned.tensor_name(part)] for part in self.planned.description.state_spec}
        made = foreign_tensors(self.layout, replace(self.weight, state=state))
        assert made is not None
        return {self.names.get(name, name): tensor for name, tensor in made.items()}


def fill_with_meta(tree: ModelTree, plan: Plan) -> None:
    """Make the model of `tree` what a load of `plan` would make it, with the tensors of the checkpoint on meta.

    Whoever calls it restores the model. Single numbers are zeros in memory: a layout may write them as text.
    """
    for weight in plan.weights:
        commit_weight(tree.modules, weight, {names[0]: _empty(spec) for names, spec in weight.specs().items()})
    for tensor in plan.tensors:
        if tensor.source is not None:
            commit_tensor(tree.modules, tensor, _empty(tensor.spec), frozen=False)
        elif tensor.spec.dtype != (own := held_tensor(tree.modules, tensor.names[0])).dtype:
            commit_tensor(tree.modules, tensor, own.detach().to(tensor.spec.dtype), frozen=False)


def outline_of(tree: ModelTree, plan: Plan, layout: str) -> tuple[list[Entry], Saved]:
    """What each tensor of `plan` becomes in the files, in the order of the model; its model is filled with meta.

    Raises:
        UnsupportedError: the layout cannot hold a weight, or the model saves what is none of its tensors.
    """
    saved = in_layout(tree.model, layout, on_meta=True)
    tied = getattr(tree.model, "all_tied_weights_keys", None) or ()
    tensors = distinct(saved.tensors, list(tied))
    _refuse_dtypes(tensors)
    weights = {weight.name: weight for weight in saved.weights}
    entries = [_weight_entry(weight, tensors, weights, saved.names, layout) for weight in plan.weights]
    for planned in plan.tensors:
        names = [saved.names.get(name, name) for name in planned.names]
        name = next((name for name in names if name in tensors), None)
        if name is not None:
            entries.append(_kept_entry(planned, name, tensors[name], layout))
    _refuse_others(tensors, entries)
    position = {name: number for number, name in enumerate(tensors)}
    entries.sort(key=lambda entry: min(position[name] for name in entry.specs))
    return entries, saved


def _empty(spec: TensorSpec) -> Tensor:
    if spec.shape == (1,):
        return torch.zeros(spec.shape, dtype=spec.dtype)
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _weight_entry(
    planned: PlannedWeight,
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, SavedWeight],
    renamed: Mapping[str, str],
    layout: str,
) -> Entry:
    weight = next(weights[name] for name in planned.names if name in weights)
    made = foreign_tensors(layout, weight)
    if made is not None:
        foreign = {renamed.get(name, name): tensor for name, tensor in made.items()}
        return Entry(
            planned=planned,
            specs=_specs(foreign),
            late=frozenset(name for name, tensor in foreign.items() if not tensor.is_meta and tensor.itemsize == 1),
            names=renamed,
            constants={},
            weight=weight,
            layout=layout,
        )
    names = {names[0]: _saved_as(names, tensors) for names in planned.specs()}
    constants = {name: tensors[name] for name in planned.names if name in tensors}  # placeholders
    own = {name: tensors[name] for name in (*names.values(), *constants)}
    return Entry(
        planned=planned,
        specs=_specs(own),
        late=frozenset(),
        names=names,
        constants=constants,
        weight=None,
        layout=layout,
    )


def _kept_entry(planned: PlannedTensor, name: str, tensor: Tensor, layout: str) -> Entry:
    """The entry of a tensor that is saved as `name`; `tensor` is the model's own where the checkpoint has none."""
    return Entry(
        planned=planned,
        specs={name: planned.spec},
        late=frozenset(),
        names={planned.names[0]: name},
        constants={} if planned.source is not None else {name: tensor},
        weight=None,
        layout=layout,
    )


def _saved_as(names: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    return next(name for name in names if name in tensors)


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in tensors.items()}


def _refuse_dtypes(tensors: Mapping[str, Tensor]) -> None:
    bad = [f"{name}: {dtype_name(tensor.dtype)}" for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]
    if bad:
        raise UnsupportedError(f"safetensors files hold no tensors of these dtypes: {shortlist(bad)}")


def _refuse_others(tensors: Mapping[str, Tensor], entries: Iterable[Entry]) -> None:
    """Raise an UnsupportedError unless the entries make all `tensors`, in these shapes and dtypes."""
    made = {name: spec for entry in entries for name, spec in entry.specs.items()}
    found = _specs(tensors)
    other = [name for name in {**found, **made} if found.get(name) != made.get(name)]
    if other:
        raise UnsupportedError(
            f"the state dict of the model holds what is none of its tensors, or lacks some: {shortlist(other)}; load "
            "it with load_and_quantize_model, and save it with save_quantized"
        )
