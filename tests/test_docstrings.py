"""The examples in the docstrings of bigq run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import bigq

MODULES = [module.name for module in pkgutil.walk_packages(bigq.__path__, "bigq.") if module.name != "bigq.__main__"]
EXAMPLES = {
    test.name: test
    for name in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str):
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(EXAMPLES[name], out=report.append)
    assert not failed, "".join(report)
