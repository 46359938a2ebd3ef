"""Match: match a model's tensors with those of a checkpoint, and list everything that does not match."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from bigq.checkpoint import FLOAT8, StoredTensor, scale_beside
from bigq.config import QuantizationConfig
from bigq.errors import CheckpointError
from bigq.formats import TensorSpec, dtype_name
from bigq.model.float32_names import float32_names
from bigq.model.patterns import match_patterns
from bigq.model.tree import ModelTree, TensorGroup, find_owner, is_dense, shape_of
from bigq.planning.mismatch import describe_mismatch
from bigq.planning.plan import PlannedTensor, PlannedWeight

__all__ = ["Match"]

_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Match:
    """Matches tensors one after the other and collects errors; `refuse` raises them all at once."""

    def __init__(
        self,
        *,
        tree: ModelTree,
        tensors: Mapping[str, StoredTensor],
        config: QuantizationConfig | None,
        offload_dtype: Callable[[str], torch.dtype | None],
        strict: bool,
        in_place: bool = False,
    ) -> None:
        self.tree, self.tensors, self.config = tree, tensors, config
        self.offload_dtype, self.strict, self.in_place = offload_dtype, strict, in_place
        self.claimed: set[str] = set()
        self.found = 0
        self.missing: dict[str, str] = {}
        self.misfits: list[str] = []
        patterns = config.keep_in_fp32_modules if config is not None else ()
        self.in_fp32 = set(match_patterns("keep_in_fp32_modules", patterns, tree.names()))
        self.own_fp32 = float32_names(tree)

    def claim(self, weight: PlannedWeight) -> None:
        """Check a weight to quantize, if the checkpoint holds it as floats, and mark its names as expected."""
        if weight.source is not None:
            self.claimed.update(weight.names)
            self._check(weight.source, weight.description.weight_shape, torch.float32)

    def tensors_outside(self, weights: Sequence[PlannedWeight]) -> Iterator[PlannedTensor]:
        """Plan all tensors but float weights to quantize: kept parameters, buffers, and weights stored quantized."""
        quantized = {name for weight in weights for name in weight.names}
        for group in self.tree.tensors:
            if quantized.isdisjoint(group.names):
                planned = self._kept(group)
                if planned is not None:
                    yield planned
        for weight in weights:
            if weight.source is None:
                for names, spec in weight.specs().items():
                    source = next((name for name in names if name in self.tensors), names[0])
                    self.claimed.update(names)
                    info = self._check(source, spec.shape, spec.dtype)
                    if info is not None and info.dtype != spec.dtype:
                        self.misfits.append(f"  {source} in {info.where}: expected {spec.dtype}, found {info.dtype}")
                    yield PlannedTensor(names=names, source=source, spec=spec, is_buffer=False, requires_grad=False)

    def _kept(self, group: TensorGroup) -> PlannedTensor | None:
        source = next((name for name in group.names if name in self.tensors and not self._is_the_models(name)), None)
        self.claimed.update(group.names)
        own, shape = group.tensor, shape_of(group.tensor)
        may_stay = not group.persistent or not self.strict or (self.in_place and not is_dense(own))
        if source is None and may_stay and not own.is_meta:
            found = TensorSpec(shape=tuple(shape), dtype=own.dtype)
        elif source is None:
            expected = f"expected {list(shape)} {dtype_name(own.dtype)}"
            hint = "" if own.is_meta else " (strict=False keeps the model's own)"
            if not group.persistent:
                hint = "; it is not persistent: build the model with init_empty_weights"
            self.missing[group.names[0]] = f"  {group.names[0]}: {expected}{hint}"
            return None
        elif not is_dense(own):
            layout = "nested" if own.is_nested else str(own.layout)
            self.misfits.append(
                f"  {source} in {self.tensors[source].where}: expected a dense tensor of the model to load it into, "
                f"found one that is {layout} (make it dense, or register it with persistent=False)"
            )
            return None
        else:
            info = self._check(source, tuple(shape), own.dtype)
            if info is None:
                return None
            found = TensorSpec(shape=tuple(info.shape), dtype=own.dtype if info.dtype in FLOAT8 else info.dtype)
        dtype, by_rule = self._dtype(group, found.dtype)
        return PlannedTensor(
            names=group.names,
            source=source,
            spec=TensorSpec(shape=found.shape, dtype=dtype),
            is_buffer=group.is_buffer,
            requires_grad=own.requires_grad and (dtype.is_floating_point or dtype.is_complex),
            is_float32_by_rule=by_rule,
        )

    def _dtype(self, group: TensorGroup, found: torch.dtype) -> tuple[torch.dtype, bool]:
        """The dtype that a kept tensor of dtype `found` gets, and whether it is float32 unexpectedly.

        It is then by a rule that the model's code does not know of.
        """
        own = group.tensor.dtype
        if own not in _CASTABLE:  # masks, indices, complex numbers, tables in float8: code is written for their dtype
            return (found if own.is_complex else own), False
        if not self.in_fp32.isdisjoint(group.names):
            return torch.float32, True
        asked = self.config.dtype if self.config is not None else None
        if not self.own_fp32.keys().isdisjoint(group.names):
            rule = next(self.own_fp32[name] for name in group.names if name in self.own_fp32)
            return torch.float32, not rule.is_expected_beside(asked or found)
        if group.is_buffer and not self._is_cast(group):
            return found, False
        by_placement = self.offload_dtype(group.names[0])
        if by_placement is not None:
            return by_placement, by_placement == torch.float32
        return asked or found, False

    def _is_the_models(self, name: str) -> bool:
        """Whether the tensor is a buffer that is not persistent: an old file may hold one, and it may be stale."""
        owner, leaf = find_owner(self.tree.modules, name)
        return leaf in owner._non_persistent_buffers_set

    def _is_cast(self, group: TensorGroup) -> bool:
        """Whether the buffer of `group` follows the dtype of parameters.

        Running statistics do, with all buffers beside them: a batch norm computes with both, and torch refuses a mix.
        """
        if self.config is not None and self.config.cast_buffers:
            return True
        return any("running_mean" in find_owner(self.tree.modules, name)[0]._buffers for name in group.names)

    def _check(self, source: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor | None:
        """What the checkpoint says of `source`, if it fits a tensor of the model of that shape and dtype."""
        info = self.tensors.get(source)
        if info is None:
            self.missing[source] = f"  {source}: expected {list(shape)}"
            return None
        self.found += 1
        if tuple(info.shape) != tuple(shape):
            self.misfits.append(f"  {source} in {info.where}: expected shape {list(shape)}, found {list(info.shape)}")
            return None
        is_unknown = info.dtype.is_floating_point and info.dtype not in _CASTABLE and info.dtype != dtype
        if info.dtype in FLOAT8 and scale_beside(source, self.tensors) is None:
            is_unknown = False  # float8 without a scale is a plain cast
        if _kind(info.dtype) != _kind(dtype) or is_unknown:
            self.misfits.append(
                f"  {source} in {info.where}: expected {_kind(dtype)}, found {dtype_name(info.dtype)}"
                + (" (a scaled storage format bigq does not know)" if is_unknown else "")
            )
            return None
        return info

    def refuse(self) -> None:
        """Raise one CheckpointError with everything that does not fit, if there is anything."""
        patterns = getattr(self.tree.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ignored = [re.compile(str(pattern)) for pattern in patterns]
        unexpected = {
            name: f"  {name} in {info.where}: found {list(info.shape)} {dtype_name(info.dtype)}"
            for name, info in self.tensors.items()
            if name not in self.claimed and not any(pattern.search(name) for pattern in ignored)
        }
        words = describe_mismatch(
            self.tree.model,
            found=self.found,
            missing=self.missing,
            misfits=self.misfits,
            unexpected=unexpected,
            strict=self.strict,
        )
        if words is not None:
            raise CheckpointError(words)


def _kind(dtype: torch.dtype) -> str:
    """What a tensor of `dtype` holds; numbers of one kind are cast to each other."""
    if dtype.is_complex:
        return "complex numbers"
    return "floating-point numbers" if dtype.is_floating_point else "integers"
