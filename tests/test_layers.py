"""Imports point downward: each file of bigq imports only from files before it in the layers of docs/design.md."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bigq"
LAYERS = [  # an import points to an earlier line, or to the left within a line
    ["checks", "reference"],
    ["replays", "ops", "eager"],
    ["files", "formats", "checkpoint", "testing", "table"],
    ["stored", "lazy_weight", "weight", "module", "linear", "convert"],
    ["config", "offload", "device_map", "model_tensors", "machine", "stages", "transaction"],
    ["transfer", "saved_tensors", "prefetch", "attach", "moves", "hooks"],
    ["selection", "runs", "stream", "footprint", "parameter_count", "quantize", "bench"],
    ["plan", "fit", "planning", "placement"],
    ["quantizer", "warm_up", "commit", "dispatch", "materialize", "store", "jobs", "fill", "report"],
    ["load"],
    ["__init__", "__main__"],
]
ORDER = [unit for layer in LAYERS for unit in layer]
ANYWHERE = {"errors"}
FILES = sorted(PACKAGE.rglob("*.py"))


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_units(path: Path) -> set[str]:
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [node.module or ""]
            if node.module == "bigq":  # `from bigq import ops`
                modules = [f"bigq.{alias.name}" for alias in node.names]
        units |= {module.split(".")[1] for module in modules if module.startswith("bigq.")}
    return units


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path):
    unit = _unit(path)
    if unit in ANYWHERE:
        assert _imported_units(path) == set()
        return
    for imported in _imported_units(path) - ANYWHERE - {unit}:
        assert ORDER.index(imported) < ORDER.index(unit), f"bigq.{unit} imports bigq.{imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_concept_a_file(path: Path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "the docstring's first line says the concept"
    assert len(text.splitlines()) <= 500
    assert path.stem not in {"utils", "common", "helpers", "misc"}


def test_kernels_know_nothing_of_bigq():
    for path in (PACKAGE.parent / "triton_kernels" / "bigq_kernels").rglob("*.py"):
        assert _imported_units(path) == set(), path


def test_the_design_document_shows_these_layers():
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| \d \| (.*?) \|", text, flags=re.MULTILINE)
    shown = [re.findall(r"`(\w+)/?`", row) for row in rows]
    shown[0].remove("bigq_kernels")
    assert shown == LAYERS[:-1]
