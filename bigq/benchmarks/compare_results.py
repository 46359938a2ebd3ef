"""compare_results: two runs of a benchmark row by row, and which differences are larger than the noise."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bigq.benchmarks.result import BenchResult
from bigq.errors import ConfigError

__all__ = ["Change", "ResultComparison", "compare_results"]

_LEAST = 0.03  # a difference that two runs on one machine may have: clocks and memory differ from run to run
_SPREADS = 3.0  # quartile deviations of both runs together: 2 standard deviations if noise is normal


@dataclass(frozen=True, kw_only=True)
class Change:
    """One reading of two runs.

    Args:
        what: the case.
        reading: its name and unit; less is better.
        before: of the first run.
        after: of the second run.
        ratio: `after` over `before`; None if that is 0.
        noise: a ratio further from 1 than this is more than noise.
    """

    what: Mapping[str, str | int]
    reading: str
    before: float
    after: float
    ratio: float | None
    noise: float

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" ("less" or "more" of bytes) beyond the noise; "" within it."""
        if self.ratio is None or abs(self.ratio - 1) <= self.noise:
            return ""
        words = ("less", "more") if self.reading.endswith("MB") else ("faster", "slower")
        return words[self.ratio > 1]


@dataclass(frozen=True, kw_only=True)
class ResultComparison:
    """Two runs of a benchmark: what `compare_results` returns.

    Args:
        benchmark: its name.
        changes: every reading that both have.
        only_before: cases that the second run lacks.
        only_after: cases that the first run lacks.
        differences: of the machines, the libraries and the settings, as "name: first, second".
    """

    benchmark: str
    changes: tuple[Change, ...]
    only_before: tuple[Mapping[str, str | int], ...]
    only_after: tuple[Mapping[str, str | int], ...]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The comparison as JSON can hold it."""
        return {**asdict(self), "changes": [{**asdict(change), "verdict": change.verdict} for change in self.changes]}


def compare_results(before: BenchResult, after: BenchResult) -> ResultComparison:
    """Compare two runs of one benchmark.

    The noise of a ratio is three times the spreads of both runs together, and 3 % at least.

    Raises:
        ConfigError: they are runs of different benchmarks.
    """
    if before.benchmark != after.benchmark:
        raise ConfigError(f"the first is a result of {before.benchmark!r}, the second of {after.benchmark!r}")
    old = {tuple(row.what.items()): row for row in before.rows}
    new = {tuple(row.what.items()): row for row in after.rows}
    changes = []
    for key, row in old.items():
        for name, reading in row.readings.items():
            other = new[key].readings.get(name) if key in new else None
            if other is None:
                continue
            changes.append(
                Change(
                    what=row.what,
                    reading=name,
                    before=reading.value,
                    after=other.value,
                    ratio=other.value / reading.value if reading.value else None,
                    noise=max(_LEAST, _SPREADS * ((reading.spread or 0) + (other.spread or 0))),
                )
            )
    return ResultComparison(
        benchmark=before.benchmark,
        changes=tuple(changes),
        only_before=tuple(row.what for key, row in old.items() if key not in new),
        only_after=tuple(row.what for key, row in new.items() if key not in old),
        differences=tuple(_differences(before, after)),
    )


def _differences(before: BenchResult, after: BenchResult) -> list[str]:
    """What the runs were made with, where that differs; rates of the machine are readings of their own."""
    pairs: list[Mapping[str, object]] = []
    for run in (before, after):
        settings = {name: value for name, value in run.settings.items() if not isinstance(value, float)}
        machine = {"device": run.environment.device, "cores": run.environment.cores}
        pairs.append({**machine, "python": run.environment.python, **run.environment.versions, **settings})
    names = dict.fromkeys([*pairs[0], *pairs[1]])
    return [
        f"{name}: {pairs[0].get(name, 'none')}, {pairs[1].get(name, 'none')}"
        for name in names
        if pairs[0].get(name) != pairs[1].get(name)
    ]
