"""Fit: its table, its curve and its plot."""

import builtins
import math

import pytest

import bigq
from bigq.calibration.fit_result import format_label


@pytest.fixture
def fit(tiny):
    return bigq.fit(tiny(blocks=2), bits=6, formats=["nf4", bigq.NF4(block_size=32), "int8", None])


def test_labels_name_what_is_not_the_default():
    formats = {
        "kept": None,
        "nf4": bigq.NF4(),
        "nf4 block_size=32 double_quant=True": bigq.NF4(block_size=32, double_quant=True),
        "fp4 double_quant=True": bigq.FP4(double_quant=True),
        "int8": bigq.Int8(),
        "int8 threshold=0.0": bigq.Int8(threshold=0.0),
    }
    assert {format_label(found) for found in formats.values()} == formats.keys()
    assert all(format_label(found) == label for label, found in formats.items())


def test_the_table_has_a_line_for_each_weight(fit):
    header, *lines, total = fit.table().splitlines()
    assert header.split() == ["weight", "nf4", "nf4", "block_size=32", "int8", "kept", "chosen", "bytes"]
    assert [line.split()[0] for line in lines] == [weight.name for weight in fit.weights]
    for line, weight in zip(lines, fit.weights, strict=True):
        assert [float(cell) for cell in line.split()[1:5]] == pytest.approx(
            [cost.sensitivity for cost in weight.costs], rel=0.01
        )
        assert line.endswith(f"{weight.costs[weight.chosen].nbytes:,}")
        assert format_label(weight.format) in line
    assert total.split()[0] == "sum"
    assert float(total.split()[1]) == pytest.approx(fit.uniform["nf4"].error, rel=0.01)


def test_the_curve_goes_from_the_smallest_choice_to_the_best(fit):
    nbytes, errors = zip(*((point.nbytes, point.error) for point in fit.curve), strict=True)
    assert list(nbytes) == sorted(nbytes)
    assert list(errors) == sorted(errors, reverse=True)
    assert (fit.curve[0], fit.curve[-1]) == (fit.uniform["nf4"], fit.uniform["kept"])
    assert fit.curve[-1].error == 0
    assert fit.uniform["nf4"].error > fit.uniform["nf4 block_size=32"].error > fit.uniform["int8"].error > 0
    below = [point for point in fit.curve if point.nbytes <= fit.nbytes]
    assert below[-1].error >= fit.error or math.isclose(below[-1].error, fit.error)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_a_file(fit, tmp_path, ending):
    pytest.importorskip("matplotlib")
    fit.plot(tmp_path / f"fit.{ending}")
    start = (tmp_path / f"fit.{ending}").read_bytes()[:100]
    assert start.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_without_matplotlib_the_error_says_how_to_install_it(fit, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(bigq.UnsupportedError, match=r"pip install 'bigq\[plots\]'"):
        fit.plot(tmp_path / "fit.png")
