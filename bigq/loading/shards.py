"""Shards: what a load does in one of several processes, which keeps some rows of each tensor.

What is planned for rows is a plan like any other, so they are read, quantized and placed as whole weights are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bigq.checkpoint import Rows, RowWindows, Source
from bigq.formats import Description, TensorSpec
from bigq.planning.plan import Plan, PlannedTensor, PlannedWeight

__all__ = ["Shards"]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The part of a plan that one process carries out.

    Args:
        whole: the plan of the whole model.
        plan: what becomes of each tensor here: shapes are those of the rows that are kept, and formats those of rows.
        windows: the rows to read, by the name in the source. What it leaves out is read whole.
        cuts: the rows to keep of a part of a weight that is made whole, by its first name in the model.
    """

    whole: Plan
    plan: Plan
    windows: Mapping[str, Rows]
    cuts: Mapping[str, Rows]

    @classmethod
    def of(cls, plan: Plan, rows: Mapping[str, Rows]) -> "Shards":
        """The part of `plan` for a process that keeps these `rows` of tensors, by first name, and others whole."""
        tensors = [_tensor_of_rows(planned, rows.get(planned.names[0])) for planned in plan.tensors]
        windows = {t.source: rows[t.names[0]] for t in plan.tensors if t.source is not None and t.names[0] in rows}
        weights: list[PlannedWeight] = []
        cuts: dict[str, Rows] = {}
        for weight in plan.weights:
            own = _rows_to_read(weight, rows)
            if weight.source is not None and own is not None:
                windows[weight.source] = own
                weight = replace(weight, description=_description_of_rows(weight.description, own))
            elif weight.source is not None:
                names = (weight.tensor_name(part) for part in _row_parts(weight))
                cuts |= {name: rows[name] for name in names if name in rows}
            weights.append(weight)
        return cls(
            whole=plan,
            plan=replace(plan, tensors=tuple(tensors), weights=tuple(weights)),
            windows=windows,
            cuts=cuts,
        )

    def source(self, source: Source) -> Source:
        """`source` with the rows that this process reads."""
        return RowWindows(source, self.windows)

    def to_read(self, *, after: "Shards | None" = None) -> Plan:
        """The plan of what comes from a source.

        With `after`, only of that of which those have read or kept other rows. What they have whole can be cut.
        """
        tensors = [planned for planned in self.plan.tensors if planned.source is not None]
        weights = list(self.plan.weights)
        if after is not None:
            tensors = [own for own in tensors if _lacks(after.windows, self.windows, own.source)]
            weights = [own for own in weights if own.source is not None and self._lacks_rows(own, after)]
        return replace(self.plan, tensors=tuple(tensors), weights=tuple(weights))

    def held(self) -> Plan:
        """What this process holds of the model in the end: its rows, in the formats of the whole weights."""
        formats = {weight.names[0]: weight.description.format for weight in self.whole.weights}
        weights = tuple(
            replace(weight, description=replace(weight.description, format=formats[weight.names[0]]))
            for weight in self.plan.weights
        )
        return replace(self.plan, weights=weights)

    def _lacks_rows(self, weight: PlannedWeight, after: "Shards") -> bool:
        names = [weight.tensor_name(part) for part in _row_parts(weight)]
        return _lacks(after.windows, self.windows, weight.source) or any(
            _lacks(after.cuts, self.cuts, name) for name in names
        )


def _lacks(had: Mapping[str, Rows], wanted: Mapping[str, Rows], name: str | None) -> bool:
    """Whether rows of the tensor `name` were taken, and they are not those that are wanted."""
    return name is not None and name in had and had[name] != wanted.get(name)


def _row_parts(weight: PlannedWeight) -> tuple[str, ...]:
    """The parts of which each row of `weight` has its own."""
    return tuple(weight.description.format.row_format.state_spec(weight.description.shape))


def _rows_to_read(weight: PlannedWeight, rows: Mapping[str, Rows]) -> Rows | None:
    """The rows of a float weight that this process has to read; None if all, because it needs or keeps them all."""
    description, own_format = weight.description, weight.description.format
    kept = {rows.get(weight.tensor_name(part)) for part in _row_parts(weight)}
    found = kept.pop()
    is_strided = description.transposed and len(description.shape) == 2
    needs_all = own_format.takes_whole(weight.method) or own_format.row_group > 1  # whose groups no shard respects
    return None if kept or is_strided or needs_all else found


def _tensor_of_rows(planned: PlannedTensor, rows: Rows | None) -> PlannedTensor:
    if rows is None:
        return planned
    return replace(planned, spec=TensorSpec(shape=(len(rows), *planned.spec.shape[1:]), dtype=planned.spec.dtype))


def _description_of_rows(description: Description, rows: Rows) -> Description:
    shape = (len(rows), *description.shape[1:])
    return replace(description, format=description.format.row_format, shape=shape)
