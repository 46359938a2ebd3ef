"""Imports point downward: a folder or file of bigq imports only from layers above it in docs/design.md."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bigq"
KERNELS = PACKAGE.parent / "triton_kernels" / "bigq_kernels"
LAYERS = [  # from the lowest to the highest; a folder, or a file beside them
    "errors",
    "system",
    "ops",
    "formats",
    "checkpoint",
    "testing",
    "weight",
    "config",
    "model",
    "planning",
    "offload",
    "footprint",
    "model_card",
    "loading",
    "interop",
    "saving",
    "calibration",
    "quantize",
    "infer_device_map",
    "open_source",
    "load_source",
    "load_into_shards",
    "load",
    "integrations",
    "dry_run",
    "converting",
    "measuring",
    "evaluation",
    "benchmarks",
    "doctor",
    "cli",
    "__init__",
    "__main__",
]
KERNEL_LAYERS = ["", "block4", "int8"]  # the files beside the folders come first
FILES = sorted(PACKAGE.rglob("*.py"))
KERNEL_FILES = sorted(KERNELS.rglob("*.py"))
MAX_FLAT = 12


def _imported(path: Path, package: str) -> set[str]:
    """The modules of `package` that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {module.removeprefix(f"{package}.") for module in modules if module.startswith(f"{package}.")}
    return found


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path):
    unit = _unit(path)
    for module in _imported(path, "bigq"):
        imported = module.partition(".")[0]
        assert LAYERS.index(imported) <= LAYERS.index(unit), f"{path.relative_to(PACKAGE)} imports bigq.{module}"


@pytest.mark.parametrize("package", [PACKAGE, KERNELS], ids=lambda path: path.name)
def test_no_file_is_imported_by_one_that_it_imports(package: Path):
    """In a folder too, at whatever distance. What is imported inside of a function counts."""
    names = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    imports = {
        name: {other for module in _imported(path, package.name) for other in _files(module, names)}
        for name, path in names.items()
        if not name.endswith("__init__")  # one that collects the names of its folder
    }
    while imports:
        leaves = {name for name, others in imports.items() if not (others & imports.keys()) - {name}}
        assert leaves, f"these import each other: {sorted(imports)}"
        imports = {name: others for name, others in imports.items() if name not in leaves}


def _files(module: str, names: dict[str, Path]) -> set[str]:
    """The file that "folder.file.name" or "folder.file" comes from; for a name of a folder, all files of it."""
    parts = module.split(".")
    for end in (len(parts), len(parts) - 1):
        if (name := ".".join(parts[:end])) in names:
            return {name}
    folder = parts[0]
    return {name for name in names if name.startswith(f"{folder}.") and not name.endswith("__init__")}


@pytest.mark.parametrize("path", [*FILES, *KERNEL_FILES], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_one_concept_a_file(path: Path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "the docstring's first line says the concept"
    assert len(text.splitlines()) <= 500
    assert path.stem not in {"utils", "common", "helpers", "misc"}


def test_few_files_lie_beside_the_folders():
    flat = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(flat) <= MAX_FLAT, flat


def test_kernels_know_nothing_of_bigq():
    for path in KERNEL_FILES:
        assert _imported(path, "bigq") == set(), path


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_a_family_of_kernels_imports_only_itself_and_what_all_share(path: Path):
    family = path.relative_to(KERNELS).parts[0] if path.parent != KERNELS else ""
    folders = {module.partition(".")[0] for module in _imported(path, "bigq_kernels")} & set(KERNEL_LAYERS)
    assert folders <= {family}


def test_the_design_document_shows_these_layers():
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    shown = re.findall(r"^\| `(\w+)/?` \|", text, flags=re.MULTILINE)
    assert shown == [unit for unit in LAYERS if not unit.startswith("__")]
