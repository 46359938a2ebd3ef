"""The examples in the docstrings of bigq run and print what they say."""

import doctest
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator

import pytest

import bigq

LIBRARY_OF = {  # what has to be installed for a module of bigq.integrations to be imported
    "bigq.evaluation.compare": "transformers",
    "bigq.dry_run.estimate": "transformers",
    "bigq.integrations.diffusers": "diffusers",
    "bigq.integrations.peft": "peft",
    "bigq.integrations.skeleton": "transformers",
    "bigq.integrations.transformers": "transformers",
    "bigq.interop.diffusers_quantizer": "diffusers",
    "bigq.interop.hf_quantizer": "transformers",
}


def _examples() -> dict[str, doctest.DocTest]:
    found = {}
    for module in pkgutil.walk_packages(bigq.__path__, "bigq."):
        is_missing = module.name in LIBRARY_OF and importlib.util.find_spec(LIBRARY_OF[module.name]) is None
        if module.name != "bigq.__main__" and not is_missing:
            tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module.name))
            found |= {test.name: test for test in tests if test.examples}
    return found


EXAMPLES = _examples()


@pytest.fixture(autouse=True)
def _transformers_as_before() -> Iterator[None]:
    """`use_as_bitsandbytes` holds for a process, and tests of bitsandbytes may follow in this one."""
    auto = sys.modules.get("transformers.quantizers.auto")
    before = {} if auto is None else dict(auto.AUTO_QUANTIZER_MAPPING)
    yield
    if auto is not None:
        auto.AUTO_QUANTIZER_MAPPING.update(before)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str):
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(EXAMPLES[name], out=report.append)
    assert not failed, "".join(report)
