"""Run an example as a user would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def examples() -> Path:
    return ROOT / "examples"


@pytest.fixture(scope="session")
def run_example():
    """`run_example("quickstart.py", *arguments, path=[...])`: what the example printed, once it has succeeded.

    Lines that it writes to stderr have to match `tolerated`.
    """

    def run(name, *arguments, path=(), tolerated="(?!)"):
        folders = [*path, ROOT, ROOT / "triton_kernels", os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders if folder),
            "OMP_NUM_THREADS": "1",  # two threads wait for each other where another process is at work
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("TRITON_INTERPRET", None)  # which the tests of the kernels set
        command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if not re.search(tolerated, line)] == []
        return done.stdout

    return run
