"""Comparison: what `compare` returns, as fields, as JSON and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

from bigq.evaluation.logits import LogitsError
from bigq.evaluation.perplexity import Perplexity
from bigq.evaluation.speed import Speed
from bigq.evaluation.weight_error import GroupError
from bigq.measuring.environment import Environment
from bigq.system.text import format_table

__all__ = ["Comparison", "Side"]

_NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models of a comparison.

    Args:
        name: of its folder or repo, or how the source was quantized.
        dtypes: of the floating-point tensors that are not quantized.
        files_nbytes: bytes of its files; None if it was quantized on the fly.
        memory_nbytes: bytes of its parameters and buffers.
        speeds: of each batch.
    """

    name: str
    dtypes: tuple[str, ...]
    files_nbytes: int | None
    memory_nbytes: int
    speeds: tuple[Speed, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A quantized model beside its source: what `compare` returns.

    Args:
        source: the float model.
        quantized: the quantized one.
        groups: weight errors by alike layers and format, with what is not quantized.
        logits: how far the outputs differ; None if they were not compared.
        perplexity: on the text; None without one.
        notes: what is left out, and why.
        environment: the machine and the libraries.
    """

    source: Side
    quantized: Side
    groups: tuple[GroupError, ...]
    logits: LogitsError | None
    perplexity: Perplexity | None
    notes: tuple[str, ...]
    environment: Environment

    @property
    def weight_error(self) -> float:
        """The relative error of all quantized weights together."""
        quantized = [group for group in self.groups if group.quantized]
        size = sum(group.source_norm**2 for group in quantized)
        difference = sum((group.error * group.source_norm) ** 2 for group in quantized)
        return sqrt(difference / size) if size else 0.0

    def to_dict(self) -> dict[str, object]:
        """The comparison as JSON can hold it."""
        return {
            "source": asdict(self.source),
            "quantized": asdict(self.quantized),
            "weight_error": self.weight_error,
            "groups": [group.to_dict() for group in self.groups],
            "logits": None if self.logits is None else self.logits.to_dict(),
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
            "notes": list(self.notes),
            "environment": self.environment.to_dict(),
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, source, quantized, change) of every measurement but the weights of single groups."""
        before, after = self.source, self.quantized
        rows = [
            ("files, MB", *_megabytes(before.files_nbytes, after.files_nbytes)),
            ("memory of the tensors, MB", *_megabytes(before.memory_nbytes, after.memory_nbytes)),
            ("error of quantized weights, relative", _NOTHING, f"{self.weight_error:.4f}", _NOTHING),
        ]
        if self.logits is not None:
            what = "output error" if self.logits.kl is None else "logits error"
            rows.append((f"{what}, relative", _NOTHING, f"{self.logits.relative_error:.4f}", _NOTHING))
        if self.logits is not None and self.logits.kl is not None:
            kl = _with_error(self.logits.kl, self.logits.kl_standard_error, "")
            rows.append(("KL(source || quantized), nats a token", _NOTHING, kl, _NOTHING))
            rows.append(("same likeliest token", _NOTHING, f"{self.logits.top1_agreement:.1%}", _NOTHING))
        if self.perplexity is not None:
            found = self.perplexity
            change = _with_error(found.change_nats, found.standard_error, "+")
            rows.append(("nats a token", f"{found.source_nats:.4f}", f"{found.quantized_nats:.4f}", change))
            rows.append(("perplexity", f"{found.source:.3f}", f"{found.quantized:.3f}", _NOTHING))
        for one, other in zip(before.speeds, after.speeds, strict=True):
            rows.extend(_speed_rows(one, other))
        return rows

    def group_rows(self) -> list[tuple[str, ...]]:
        """(weights, format, tensors, MB before, MB after, error, worst error) of each group that has an error."""
        changed = [group for group in self.groups if group.error]
        same = [group for group in self.groups if not group.error]
        rows: list[tuple[str, ...]] = [
            (
                group.group,
                group.format,
                str(group.weights),
                f"{group.source_nbytes / 1e6:.3f}",
                f"{group.nbytes / 1e6:.3f}",
                f"{group.error:.4f}",
                f"{group.worst_error:.4f}",
            )
            for group in changed
        ]
        if same:
            sums = (sum(group.source_nbytes for group in same), sum(group.nbytes for group in same))
            count = sum(group.weights for group in same)
            rows.append(("all others", "unchanged", str(count), *(f"{nbytes / 1e6:.3f}" for nbytes in sums), "0", "0"))
        return rows

    def table(self) -> str:
        """Two tables as text, and the notes: all measurements, and the weights by alike layers."""
        measured = format_table([MEASURED, *self.rows()])
        weights = format_table([WEIGHTS, *self.group_rows()])
        return "\n\n".join((measured, weights, *self.notes))


MEASURED = ("", "source", "quantized", "change")
WEIGHTS = ("weights", "format", "tensors", "MB before", "MB after", "error", "largest")


def _megabytes(before: int | None, after: int | None) -> tuple[str, str, str]:
    texts = [_NOTHING if nbytes is None else f"{nbytes / 1e6:.3f}" for nbytes in (before, after)]
    return texts[0], texts[1], _times(before, after)


def _times(before: float | None, after: float | None) -> str:
    return _NOTHING if not before or after is None else f"x {after / before:.2f}"


def _with_error(value: float, error: float | None, sign: str) -> str:
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} +- {error:.4f}"


def _speed_rows(before: Speed, after: Speed) -> Sequence[tuple[str, str, str, str]]:
    """The rows of one batch."""
    rows = []
    for what, one, other in (
        ("prefill", before.prefill, after.prefill),
        ("decode", before.decode, after.decode),
    ):
        if one is not None and other is not None:
            name = f"{what}, batch {before.batch}, tokens/s"
            rows.append((name, f"{one.value:.1f}", f"{other.value:.1f}", _times(one.value, other.value)))
    if before.peak_nbytes is not None or after.peak_nbytes is not None:
        rows.append((f"peak memory, batch {before.batch}, MB", *_megabytes(before.peak_nbytes, after.peak_nbytes)))
    return rows
