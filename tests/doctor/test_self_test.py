"""self_test: right ops pass, and each thing that can be wrong with one is found."""

import pytest
import torch

from bigq.doctor import self_test as module
from bigq.doctor.self_test import self_test
from bigq.formats import NF4, Int8
from bigq.formats.block4 import Block4

CPU = torch.device("cpu")


@pytest.fixture
def _few_tokens(monkeypatch):
    """One number of tokens, which is enough to see that something is wrong."""
    monkeypatch.setattr(module, "_TOKENS", (1,))


def _failed():
    return {check.what: check.detail for check in self_test(CPU) if not check.passed}


def test_right_ops_pass():
    checks = self_test(CPU)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 4 * 2 * 3  # formats, widths; codes and two dtypes


def _wrapped(monkeypatch, owner, name, change):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: change(original(self, *args, **kwargs)))


@pytest.mark.usefixtures("_few_tokens")
def test_a_code_beside_the_nearest_is_found(monkeypatch):
    def next_code(state):
        state["packed"][5, 7] ^= 0x11
        return state

    _wrapped(monkeypatch, Block4, "quantize", next_code)
    failed = _failed()
    assert len(failed) == 6  # a wrong code multiplies as well as a right one
    assert all("further away than to its nearest code" in detail for detail in failed.values())


@pytest.mark.usefixtures("_few_tokens")
def test_a_scale_that_is_too_small_is_found(monkeypatch):
    _wrapped(monkeypatch, Block4, "scales", lambda scales: scales * 0.98)
    _wrapped(monkeypatch, Int8, "scales", lambda scales: scales * 0.98)
    failed = _failed()
    assert "a scale is not the largest magnitude of its block" in failed["nf4, K = 512: codes and scales"]
    assert "a scale is not the largest magnitude of its row" in failed["int8, K = 200: codes and scales"]


@pytest.mark.parametrize("owner", [Block4, Int8], ids=lambda owner: owner.__name__)
@pytest.mark.usefixtures("_few_tokens")
def test_a_product_that_is_a_little_off_is_found(owner, monkeypatch):
    _wrapped(monkeypatch, owner, "linear", lambda out: out * (1 + 8 * torch.finfo(out.dtype).eps))
    failed = _failed()
    assert len([what for what in failed if "products" in what]) == len(failed) == (12 if owner is Block4 else 4)
    assert "1 tokens: the error is" in next(iter(failed.values()))


@pytest.mark.usefixtures("_few_tokens")
def test_outliers_are_part_of_a_product(monkeypatch):
    original = Int8.linear
    monkeypatch.setattr(Int8, "linear", lambda self, x, *rest: original(self, torch.where(x.abs() >= 6, 0, x), *rest))
    assert len(_failed()) == 4


@pytest.mark.usefixtures("_few_tokens")
def test_a_call_that_differs_from_the_first_is_found(monkeypatch):
    original, calls = NF4.linear, []

    def linear(self, *args):
        calls.append(0)
        return original(self, *args) + (len(calls) == 3)

    monkeypatch.setattr(NF4, "linear", linear)
    assert "3 calls give different numbers, so a replay is wrong" in next(iter(_failed().values()))


@pytest.mark.usefixtures("_few_tokens")
def test_an_op_that_raises_has_failed(monkeypatch):
    def linear(self, *args):
        raise RuntimeError("ptxas is missing")

    monkeypatch.setattr(Int8, "linear", linear)
    assert set(_failed().values()) == {"RuntimeError: ptxas is missing"}


@pytest.mark.gpu
def test_the_kernels_pass():
    assert [check for check in self_test(torch.device("cuda")) if not check.passed] == []
