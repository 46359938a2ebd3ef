"""BenchResult: what it saves is read again, and anything else is refused."""

import json

import pytest
import torch

from bigq.benchmarks.result import BenchResult, Row, read_result, short_number
from bigq.errors import ConfigError
from bigq.measuring.environment import Environment
from bigq.measuring.reading import Reading

RESULT = BenchResult(
    benchmark="linears",
    settings={"dtype": "bfloat16", "copy_bytes_per_s": 4e12},
    rows=(
        Row(
            what={"tokens": 1, "format": "nf4"},
            readings={"us": Reading(value=12.5, spread=0.01)},
            derived={"GB/s": 800},
        ),
        Row(what={"tokens": 2, "format": "nf4"}, readings={"MB": Reading(value=3.0)}),
    ),
    environment=Environment.of(torch.device("cpu")),
)


def test_a_saved_result_is_read_again(tmp_path):
    RESULT.save(tmp_path / "a.json")
    assert read_result(tmp_path / "a.json") == RESULT


def test_a_table_has_a_dash_where_a_row_has_no_number():
    assert RESULT.columns() == ["tokens", "format", "us", "GB/s", "MB"]
    assert RESULT.cells() == [["1", "nf4", "12.5", "800", "-"], ["2", "nf4", "-", "-", "3.00"]]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"bigq_bench": 1, "benchmark": "hats"}', '{"bigq_bench": 1, "benchmark": "linears", "rows": 3}'],
)
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="is no result of this bigq's bench"):
        read_result(tmp_path / "a.json")


def test_a_result_of_another_version_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**RESULT.to_dict(), "bigq_bench": 2}))
    with pytest.raises(ConfigError, match="is no result"):
        read_result(tmp_path / "a.json")


def test_three_digits_without_an_exponent():
    numbers = {0.0: "0", 0.01234: "0.0123", 0.5: "0.500", 1.0: "1.00", 4.567: "4.57", 78.91: "78.9", 1234.5: "1234"}
    assert {value: short_number(value) for value in numbers} == numbers
