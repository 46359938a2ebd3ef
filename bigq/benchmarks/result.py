"""BenchResult: what a benchmark measured, with what, as a table and as JSON that another run is compared with."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from bigq.errors import ConfigError
from bigq.measuring.environment import Environment
from bigq.measuring.reading import Reading
from bigq.system.json_text import parse_json

__all__ = ["BENCHMARKS", "BenchResult", "Row", "read_result", "short_number"]

BENCHMARKS = ("linears", "model", "loading", "offload")
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case of a benchmark.

    Args:
        what: the case, such as {"shape": "4096x4096", "tokens": 1, "format": "nf4"}; no two rows have the same.
        readings: what was measured, by name and unit, such as {"us": ...}; less is better.
        derived: what follows from it, such as {"GB/s": ...}.
    """

    what: Mapping[str, str | int]
    readings: Mapping[str, Reading]
    derived: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What a benchmark measured.

    Args:
        benchmark: its name, one of BENCHMARKS.
        settings: what it was told, and what it measured of the machine.
        rows: the cases.
        environment: the machine and the libraries.
    """

    benchmark: str
    settings: Mapping[str, str | int | float | None]
    rows: tuple[Row, ...]
    environment: Environment

    def to_dict(self) -> dict[str, object]:
        """The result as JSON can hold it; `read_result` reads it."""
        return {
            "bigq_bench": _VERSION,
            "benchmark": self.benchmark,
            "settings": dict(self.settings),
            "environment": self.environment.to_dict(),
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Write the result to a JSON file."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def columns(self) -> list[str]:
        """The names of all cases, readings and derived numbers, in their order."""
        names = [{**row.what, **row.readings, **row.derived} for row in self.rows]
        return list(dict.fromkeys(name for row in names for name in row))

    def cells(self) -> list[list[str]]:
        """The rows under `columns`."""
        return [[_cell(row, name) for name in self.columns()] for row in self.rows]


def read_result(path: Path) -> BenchResult:
    """Read what `BenchResult.save` wrote.

    Raises:
        ConfigError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        said, _ = parse_json(path.read_bytes())
        assert isinstance(said, dict)
        if said.get("bigq_bench") != _VERSION or said.get("benchmark") not in BENCHMARKS:
            raise ValueError("no such benchmark")
        environment = said["environment"]
        known = {each.name for each in fields(Environment)}
        return BenchResult(
            benchmark=said["benchmark"],
            settings=said["settings"],
            rows=tuple(_row(row) for row in said["rows"]),
            environment=Environment(**{name: value for name, value in environment.items() if name in known}),
        )
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{path} is no result of this bigq's bench: write one with `bigq bench ... --out`") from error


def short_number(value: float) -> str:
    """Three digits or more, without an exponent: 0.0123, 4.56, 78.9, 1234."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    digits = 2
    while value < 1 and digits < 8:
        value, digits = value * 10, digits + 1
    return f"{value / 10 ** (digits - 2):.{digits if value < 10 else digits - 1}f}"


def _row(said: Mapping[str, Mapping[str, dict[str, float]]]) -> Row:
    return Row(
        what=dict(said["what"]),  # type: ignore[arg-type]
        readings={name: Reading(value=float(r["value"]), spread=r["spread"]) for name, r in said["readings"].items()},
        derived=dict(said["derived"]),  # type: ignore[arg-type]
    )


def _cell(row: Row, name: str) -> str:
    if name in row.what:
        return str(row.what[name])
    if name in row.readings:
        return short_number(row.readings[name].value)
    return short_number(row.derived[name]) if name in row.derived else "-"
