"""Private names of torch and Triton stand in the three files of internals, and nowhere else in what is installed."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "bigq", ROOT / "triton_kernels" / "bigq_kernels"]
FILES = [path for package in PACKAGES for path in sorted(package.rglob("*.py")) if path.name != "internals.py"]
GLUON = ROOT / "triton_kernels" / "bigq_kernels" / "block4" / "gluon"  # taken with TESTED_TRITON only, and has a twin
PRIVATE = re.compile(r"^torch(\.\w+)*\._(?!_)|^triton\.(_(?!_)|(runtime|compiler|backends|tools)\b)|\._C\b")
KNOWN = re.compile(
    r"\b(_cdata|_use_count|_version|packed_metadata|get_current_stream|global_scratch_size|launch_enter_hook"
    r"|NonDynamicallyQuantizableLinear|DisableTorchFunctionSubclass|TorchDispatchMode|_flat_weights\w*)\b"
)
# Underscored, and part of what others write subclasses and hooks with.
PART_OF_AN_INTERFACE = {
    # of nn.Module, which its subclasses extend, and tables of which every nn.Module has its own
    "_apply", "_buffers", "_load_from_state_dict", "_modules", "_non_persistent_buffers_set", "_parameters",
    "_hf_hook", "_old_forward",  # what accelerate puts on a module, known to all that use its hooks
    "_fields", "_replace",  # of named tuples
}  # fmt: skip
OPEN = {
    "int8/configs.py": "triton.runtime.driver",  # which is to go
    "gluon/scales.py": "_memory._reinterpret",  # of the releases of Gluon before 3.9
}


def _names(tree):
    """(line, dotted name or attribute) of imports and attributes; strings and comments are not looked at."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id


@cache
def _own_names():
    """Underscored names that bigq gives to its own functions, classes and attributes, or may take from others."""
    own = set(PART_OF_AN_INTERFACE)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    return own


def _private(tree):
    for line, name in _names(tree):
        owner, _, attribute = name.rpartition(".")
        foreign = owner not in ("", "self", "cls") and not owner.startswith("bigq")
        underscored = attribute.startswith("_") and not attribute.startswith("__") and attribute not in _own_names()
        if PRIVATE.search(name) or KNOWN.search(name) or (foreign and underscored):
            yield line, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_private_name_stands_in_internals_only(path):
    found = list(_private(ast.parse(path.read_text())))
    opened = OPEN.get(f"{path.parent.name}/{path.name}")
    assert [entry for entry in found if entry[1] != opened] == []


@pytest.mark.parametrize("path", [path for path in FILES if GLUON not in path.parents], ids=lambda path: path.name)
def test_gluon_stands_in_its_folder_only(path):
    assert not [name for _, name in _names(ast.parse(path.read_text())) if name.startswith("triton.experimental")]


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._storage_Use_Count(x)",
        "y = x.untyped_storage()._cdata",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "import torch._dynamo",
        "from triton.runtime import driver",
        "knobs.runtime.launch_enter_hook.add(note)",
        "torch._grouped_mm(x, y)",
        "z = x._private_thing",
        "run.launch(x.packed_metadata)",
    ],
)
def test_they_are_found(line):
    assert list(_private(ast.parse(line)))
    assert not list(_private(ast.parse(f"x = {line!r}  # {line}")))


@pytest.mark.parametrize("path", [path for path in FILES if PACKAGES[1] in path.parents], ids=lambda path: path.name)
def test_every_launch_says_whether_products_and_sums_are_fused(path):
    """Triton 3.10 has another default than the releases before it; `launch` gives the option itself."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    for call in (call for call in calls if isinstance(call.func, ast.Subscript)):
        if ast.unparse(call.func.value).endswith("_kernel"):
            assert "enable_fp_fusion" in {keyword.arg for keyword in call.keywords}, ast.unparse(call.func)
