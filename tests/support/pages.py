"""Pages: the snippets of README.md and docs/*.md, what they need, and what they are said to print."""

import doctest
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Snippet", "bash", "pages", "prints", "snippets"]

ROOT = Path(__file__).parents[2]
_PYTHON = re.compile(
    r"(?:^<!-- (?P<needs>needs [^>]+) -->\n)?"
    r"^```python\n(?P<code>.*?)^```$"
    r"(?:\n\n^```text\n(?P<output>.*?)^```$)?",
    flags=re.DOTALL | re.MULTILINE,
)
_CHECKER = doctest.OutputChecker()
_VARIES = re.compile(r"\d+\.\d+")  # seconds, and sizes that a release of another library may change


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """Python code of a page.

    `needs` is what the comment before it names, such as "needs a GPU"; `output` is the text block after it.
    """

    code: str
    needs: str | None
    output: str | None


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and every page of docs/, in the order of their names."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(page: Path) -> list[Snippet]:
    """The Python snippets of a page, in their order."""
    found = _PYTHON.finditer(page.read_text())
    return [Snippet(code=match["code"], needs=match["needs"], output=match["output"]) for match in found]


def bash(page: Path) -> list[str]:
    """The commands of a page: every line of its bash blocks that is not empty."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def prints(expected: str, printed: str) -> bool:
    """Whether a snippet printed what its page says, whatever the digits of decimal fractions and the spaces are."""
    expected, printed = (_VARIES.sub("0.0", text) for text in (expected, printed))
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    return _CHECKER.check_output(expected, printed, flags)
