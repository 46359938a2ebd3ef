"""Write the tables of docs/benchmarks.md from docs/results/*.json; `--check` only says whether they are up to date.

In the page, a table stands between `<!-- results: NAME -->` and `<!-- end of results -->`. Each file of results has
`machine`, `date`, `versions`, `unit`, `columns` and `rows`. A row is a list of cells: a text, a number, several
numbers, or null. `grouped` is the number of leading columns in which a repeated value is left blank, and `signed` says
that numbers are printed with their sign.
"""

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", flags=re.DOTALL)


class _Number(str):
    """A number as the file spells it, so that 24.0 and 0.0940 keep their zeros."""


def table(name: str) -> str:
    """One line about how docs/results/NAME.json was measured, and its rows as a table."""
    text = (DOCS / "results" / f"{name}.json").read_text(encoding="utf-8")
    results = json.loads(text, parse_float=_Number, parse_int=_Number)
    grouped, is_signed = int(results.get("grouped", 0)), results.get("signed", False)
    versions = ", ".join(f"{library} {version}" for library, version in results["versions"].items())
    lines = [f"{_sentence(results['unit'])} {_sentence(results['machine'])} {results['date']}, {versions}.", ""]
    lines += [_line(results["columns"]), "|" + "---|" * len(results["columns"])]
    before = [None] * grouped
    for row in results["rows"]:
        if len(row) != len(results["columns"]):
            raise ValueError(f"{name}.json: {len(results['columns'])} columns, and a row with {len(row)} cells: {row}")
        shown = ["" if row[: i + 1] == before[: i + 1] else row[i] for i in range(grouped)]
        lines.append(_line([*shown, *(_cell(cell, is_signed) for cell in row[grouped:])]))
        before = row[:grouped]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _cell(cell: object, is_signed: bool) -> str:
    if isinstance(cell, list):
        return ", ".join(_cell(part, is_signed) for part in cell)
    if isinstance(cell, _Number):
        return f"+{cell}" if is_signed and not cell.startswith("-") else cell
    return "" if cell is None else str(cell)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def with_tables(page: str) -> str:
    """The text of a page with every marked table written anew."""
    return _MARKED.sub(lambda marked: f"{marked[1]}\n{table(marked[2])}\n{marked[3]}", page)


if __name__ == "__main__":
    path = DOCS / "benchmarks.md"
    page = path.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit(with_tables(page) != page and "docs/benchmarks.md is out of date: run python docs/tables.py")
    path.write_text(with_tables(page), encoding="utf-8")
