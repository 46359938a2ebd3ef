"""Which kernel runs when, as the page says it, is what `choose` says; and the examples of both `choose` are right."""

import doctest
import runpy
from pathlib import Path

import pytest
import torch

from bigq_kernels.block4 import choose as block4
from bigq_kernels.gpu import Gpu
from bigq_kernels.int8 import choose as int8

FOLDER = Path(__file__).parents[2] / "triton_kernels"


@pytest.fixture(scope="module")
def ways():
    return runpy.run_path(str(FOLDER / "bench" / "ways.py"))


def test_the_page_holds_the_tables_of_choose(ways):
    text = (FOLDER / "README.md").read_text()
    assert all(text.count(mark) == 1 for mark in ways["MARKS"])
    assert ways["page"](text) == text, "run: python triton_kernels/bench/ways.py --write"


def test_spans_of_ways(ways):
    most = ways["MOST"]
    assert ways["spans"](lambda m: "a") == "from 1 `a`"
    assert ways["spans"](lambda m: "a" if m == 1 else "b" if m < 5 else "c") == "1 `a`, 2 to 4 `b`, from 5 `c`"
    assert ways["spans"](lambda m: "a" if m < most else "b") == f"1 to {most - 1} `a`, from {most} `b`"


@pytest.mark.parametrize("module", [block4, int8], ids=["block4", "int8"])
def test_the_examples_of_choose(module):
    tried = doctest.testmod(module)
    assert tried.attempted == 4
    assert tried.failed == 0


def test_the_example_of_the_page(capsys):
    text = (FOLDER / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    said = [line.partition("  # ")[2] for line in code.splitlines() if line.startswith("print")]
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("module", [block4, int8], ids=["block4", "int8"])
def test_a_device_is_asked_what_it_is(module, device):
    rest = (torch.float16, True) if module is int8 else (64, torch.float16)
    for m in (1, 3, 33, 2000):
        assert module.choose(device, m, 4096, 4096, *rest) == module.choose(Gpu.of(device), m, 4096, 4096, *rest)
