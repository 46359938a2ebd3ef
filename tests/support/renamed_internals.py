"""A file of internals as it is with a torch or a Triton that has other names for private parts.

Renaming them in the file has the effect of renaming them there. As a pytest plugin (`PYTHONPATH=tests/support python -m
pytest -p renamed_internals`) it renames all of them, before anything else is imported.
"""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "bigq.system.internals": ROOT / "bigq" / "system" / "internals.py",
    "bigq_kernels.internals": ROOT / "triton_kernels" / "bigq_kernels" / "internals.py",
}
NAMES = {
    "bigq.system.internals": (
        "DisableTorchFunctionSubclass",
        "NonDynamicallyQuantizableLinear",
        "_cdata",
        "_check",
        "_functorch",
        "_get_tracing_state",
        "_grouped_mm",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
        "_make_wrapper_subclass",
        "_profiler_enabled",
        "_saved_tensors_hooks_is_enabled",
        "_schema",
        "_storage_Use_Count",
        "_top_saved_tensors_default_hooks",
        "_use_count",
        "_version",
        "unflatten_dense_tensors",
    ),
    "bigq_kernels.internals": (
        "TorchDispatchMode",
        "calls",
        "driver",
        "function",
        "get_current_stream",
        "global_scratch_size",
        "knobs",
        "launch_enter_hook",
        "packed_metadata",
        "profile_scratch_size",
        "run",
    ),
}


def renamed(module: str, *names: str) -> ModuleType:
    """`module` where torch or Triton calls `names` otherwise."""
    source = FILES[module].read_text()
    for name in names:
        source, found = re.subn(rf"(?<=[.\"])(?<!\.\.){name}\b|(?<=import ){name}\b", f"{name}_renamed", source)
        assert found, f"{FILES[module]} does not name {name}"
    made = ModuleType(module)
    made.__dict__["__file__"] = str(FILES[module])
    exec(compile(source, str(FILES[module]), "exec"), made.__dict__)
    return made


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    assert not any(name.partition(".")[0] in ("bigq", "bigq_kernels") for name in sys.modules), "too late"
    for module, names in NAMES.items():
        sys.modules[module] = renamed(module, *names)
