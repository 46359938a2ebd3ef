"""compare_results: ratios, what is beyond the noise, and what only one run has."""

from dataclasses import replace

import pytest
import torch

from bigq.benchmarks.compare_results import compare_results
from bigq.benchmarks.result import BenchResult, Row
from bigq.errors import ConfigError
from bigq.measuring.environment import Environment
from bigq.measuring.reading import Reading

MACHINE = replace(Environment.of(torch.device("cpu")), device="GPU", versions={"torch": "2.13.0"})


def _run(values, spread=0.01, **settings):
    """A run with a row for each number of tokens."""
    rows = [Row(what={"tokens": n}, readings={"us": Reading(value=v, spread=spread)}) for n, v in values.items()]
    return BenchResult(benchmark="linears", settings=settings, rows=tuple(rows), environment=MACHINE)


def test_a_difference_has_to_exceed_the_noise():
    found = compare_results(
        _run({1: 100.0, 2: 100.0, 3: 100.0, 4: 100.0}), _run({1: 107.0, 2: 105.0, 3: 93.0, 4: 95.0})
    )
    assert [change.noise for change in found.changes] == [pytest.approx(0.06)] * 4  # 3 * (1 % + 1 %)
    assert [change.verdict for change in found.changes] == ["slower", "", "faster", ""]
    assert found.changes[0].ratio == pytest.approx(1.07)


def test_single_readings_have_a_noise_of_three_percent():
    found = compare_results(_run({1: 100.0, 2: 100.0}, spread=None), _run({1: 102.0, 2: 104.0}, spread=None))
    assert [change.verdict for change in found.changes] == ["", "slower"]


def test_bytes_are_less_or_more():
    one, two = (
        replace(_run({}), rows=(Row(what={"format": "nf4"}, readings={"MB": Reading(value=value)}),))
        for value in (4.0, 2.0)
    )
    assert [compare_results(*pair).changes[0].verdict for pair in ((one, two), (two, one))] == ["less", "more"]


def test_what_one_run_lacks_and_what_else_differs():
    before = _run({1: 1.0, 2: 1.0}, dtype="bfloat16", rate=1.0)
    after = replace(_run({1: 1.0, 4: 0.0}, dtype="float32", rate=2.0), environment=replace(MACHINE, device="other"))
    found = compare_results(before, after)
    assert (found.only_before, found.only_after) == (({"tokens": 2},), ({"tokens": 4},))
    assert found.differences == ("device: GPU, other", "dtype: bfloat16, float32")
    assert found.to_dict()["changes"][0]["verdict"] == ""


def test_nothing_is_divided_by_zero():
    change = compare_results(_run({1: 0.0}), _run({1: 1.0})).changes[0]
    assert (change.ratio, change.verdict) == (None, "")


def test_two_benchmarks_are_refused():
    with pytest.raises(ConfigError, match="a result of 'linears', the second of 'model'"):
        compare_results(_run({}), replace(_run({}), benchmark="model"))
