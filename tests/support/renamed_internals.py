"""A file of internals as it is with a torch or a Triton that has other names for private parts.

Renaming them in the file has the effect of renaming them there. As a pytest plugin it does so before anything else is
imported, with all of them or with some (`--renamed=_version,driver`):

    PYTHONPATH=.:triton_kernels:tests/support python -m pytest -p renamed_internals
"""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "bigq.system.internals": ROOT / "bigq" / "system" / "internals.py",
    "bigq.system.distributed.internals": ROOT / "bigq" / "system" / "distributed" / "internals.py",
    "bigq_kernels.internals": ROOT / "triton_kernels" / "bigq_kernels" / "internals.py",
}
NAMES = {
    "bigq.system.internals": (
        "DisableTorchFunctionSubclass",
        "NonDynamicallyQuantizableLinear",
        "_EXTRA_STATE_KEY_SUFFIX",
        "_cdata",
        "_check",
        "_current_graph_task_id",
        "_current_level",
        "_foreach_copy_",
        "_fsdp_param",
        "_functorch",
        "_get_tracing_state",
        "_grouped_mm",
        "_has_any_global_hook",
        "_indices",
        "_is_view",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
        "_make_wrapper_subclass",
        "_profiler_enabled",
        "_saved_tensors_hooks_is_enabled",
        "_schema",
        "_storage_Use_Count",
        "_top_saved_tensors_default_hooks",
        "_use_count",
        "_values",
        "_unsafe_view",
        "_version",
        "unflatten_dense_tensors",
    ),
    "bigq.system.distributed.internals": (
        "_composable_state",
        "_distributed_c10d",
        "_dynamo_utils",
        "_fsdp_param_group",
        "_get_fsdp_state",
        "_ignored_params",
        "_is_fsdp_managed_module",
        "_module_state_mapping",
        "_sharded_param_data",
        "_spec",
    ),
    "bigq_kernels.internals": (
        "TorchDispatchMode",
        "active",
        "add",
        "calls",
        "driver",
        "function",
        "get_cache_manager",
        "get_current_stream",
        "global_scratch_size",
        "knobs",
        "launch_enter_hook",
        "launch_exit_hook",
        "packed_metadata",
        "profile_scratch_size",
        "remove",
        "run",
        "triton_key",
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


def pytest_addoption(parser: pytest.Parser) -> None:
    every = ",".join(dict.fromkeys(name for names in NAMES.values() for name in names))
    parser.addoption("--renamed", default=every, help="private names of torch and Triton, between commas (all of them)")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    assert not any(name.partition(".")[0] in ("bigq", "bigq_kernels") for name in sys.modules), "too late"
    wanted = early_config.known_args_namespace.renamed.split(",")
    for module, names in NAMES.items():
        sys.modules[module] = renamed(module, *(name for name in names if name in wanted))


def pytest_report_header(config: pytest.Config) -> str:
    return f"renamed, with the tests skipped of what only they can do: {config.getoption('--renamed')}"
