"""Match: match a model's tensors with those of a checkpoint, and list everything that does not match."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from bigq.checkpoint import FLOAT8, StoredTensor, is_scaled
from bigq.config import QuantizationConfig
from bigq.errors import CheckpointError
from bigq.formats import TensorSpec, dtype_name
from bigq.model.patterns import match_patterns
from bigq.model.tree import ModelTree, TensorGroup
from bigq.planning.plan import PlannedTensor, PlannedWeight

__all__ = ["Match"]


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
    ) -> None:
        self.tree, self.tensors, self.config = tree, tensors, config
        self.offload_dtype, self.strict = offload_dtype, strict
        self.claimed: set[str] = set()
        self.missing: list[str] = []
        self.misfits: list[str] = []
        patterns = config.keep_in_fp32_modules if config is not None else ()
        self.in_fp32 = set(match_patterns("keep_in_fp32_modules", patterns, tree.names()))

    def claim(self, weight: PlannedWeight) -> None:
        """Check a weight to quantize, if the checkpoint holds it as floats, and mark its names as expected."""
        if weight.source is not None:
            self.claimed.update(weight.names)
            self._check(weight.source, weight.description.weight_shape, floating=True)

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
                    info = self._check(source, spec.shape, floating=False)
                    if info is not None and info.dtype != spec.dtype:
                        self.misfits.append(f"  {source} in {info.where}: expected {spec.dtype}, found {info.dtype}")
                    yield PlannedTensor(names=names, source=source, spec=spec, is_buffer=False, requires_grad=False)

    def _kept(self, group: TensorGroup) -> PlannedTensor | None:
        source = next((name for name in group.names if name in self.tensors), None)
        self.claimed.update(group.names)
        own = group.tensor
        if source is None and (not group.persistent or not self.strict) and not own.is_meta:
            found = TensorSpec(shape=tuple(own.shape), dtype=own.dtype)
        elif source is None:
            expected = f"expected {list(own.shape)} {dtype_name(own.dtype)}"
            hint = "" if own.is_meta else " (strict=False keeps the model's own)"
            if not group.persistent:
                hint = "; it is not persistent: build the model with init_empty_weights"
            self.missing.append(f"  {group.names[0]}: {expected}{hint}")
            return None
        else:
            info = self._check(source, tuple(own.shape), floating=own.is_floating_point(), dtype=own.dtype)
            if info is None:
                return None
            found = TensorSpec(shape=tuple(info.shape), dtype=own.dtype if info.dtype in FLOAT8 else info.dtype)
        dtype, by_rule = self._dtype(group, found.dtype)
        return PlannedTensor(
            names=group.names,
            source=source,
            spec=TensorSpec(shape=found.shape, dtype=dtype),
            is_buffer=group.is_buffer,
            requires_grad=own.requires_grad and dtype.is_floating_point,
            is_float32_by_rule=by_rule,
        )

    def _dtype(self, group: TensorGroup, found: torch.dtype) -> tuple[torch.dtype, bool]:
        """The dtype that a kept tensor of dtype `found` gets, and whether a rule for this tensor makes it float32."""
        if not found.is_floating_point or found in FLOAT8:  # the model's own float8, maybe with a scale beside it
            return found, False
        if not self.in_fp32.isdisjoint(group.names):
            return torch.float32, True
        if group.is_buffer and not (self.config is not None and self.config.cast_buffers):
            return found, False
        by_placement = self.offload_dtype(group.names[0])
        if by_placement is not None:
            return by_placement, by_placement == torch.float32
        asked = self.config.dtype if self.config is not None else None
        return asked or found, False

    def _check(
        self, source: str, shape: tuple[int, ...], *, floating: bool, dtype: torch.dtype | None = None
    ) -> StoredTensor | None:
        info = self.tensors.get(source)
        if info is None:
            self.missing.append(f"  {source}: expected {list(shape)}")
            return None
        if tuple(info.shape) != tuple(shape):
            self.misfits.append(f"  {source} in {info.where}: expected shape {list(shape)}, found {list(info.shape)}")
            return None
        castable = info.dtype in (dtype, torch.float64, torch.float32, torch.float16, torch.bfloat16)
        castable = castable or (info.dtype in FLOAT8 and not is_scaled(source, self.tensors))
        if floating and not castable:
            self.misfits.append(
                f"  {source} in {info.where}: expected floating-point numbers, found {dtype_name(info.dtype)}"
                + (" (a scaled storage format bigq does not know)" if info.dtype.is_floating_point else "")
            )
            return None
        if not floating and info.dtype.is_floating_point:
            self.misfits.append(f"  {source} in {info.where}: expected integers, found {dtype_name(info.dtype)}")
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
        sections = [("missing from the checkpoint", self.missing), ("of the wrong shape or kind", self.misfits)]
        if self.strict:
            sections.append(("unexpected (strict=False ignores them)", list(unexpected.values())))
        lines = [f"{len(found)} {title}:\n" + "\n".join(found) for title, found in sections if found]
        if lines:
            hint = _prefix_hint([line.strip().partition(":")[0] for line in self.missing], list(unexpected))
            raise CheckpointError(
                f"the checkpoint does not fit {type(self.tree.model).__name__}:\n" + "\n".join(lines) + hint
            )


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    """A hint for the last line of the error, if adding or dropping one prefix would make the names agree."""
    for longer, shorter, what in ((unexpected, missing, "the checkpoint's"), (missing, unexpected, "the model's")):
        for name in longer[:1] if shorter else []:
            for other in shorter:
                prefix = name.removesuffix(other)
                if prefix != name and prefix.endswith(".") and {prefix + x for x in shorter} & set(longer):
                    return f"\nhint: {what} names begin with {prefix!r} and the other's do not"
    return ""
