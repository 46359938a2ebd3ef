"""compare_logits: KL, agreement and relative error, by their definitions."""

import math

import pytest
import torch

from bigq.evaluation.logits import compare_logits


def test_equal_logits_differ_by_nothing():
    windows = [torch.randn(5, 7), torch.randn(3, 7)]
    found = compare_logits(windows, windows)
    assert (found.tokens, found.relative_error, found.kl, found.top1_agreement) == (8, 0.0, 0.0, 1.0)
    assert found.kl_standard_error == 0.0


def test_against_probabilities_by_hand():
    """Two tokens of two ids: p = (3/4, 1/4) and q = (1/2, 1/2), then p = q."""
    log3 = math.log(3)
    source, quantized = torch.tensor([[log3, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = compare_logits([source], [quantized])
    assert found.kl == pytest.approx(kl / 2, rel=1e-6)
    assert found.kl_standard_error == pytest.approx(kl / 2, rel=1e-6)  # std of (kl, 0) is kl / sqrt(2)
    assert found.relative_error == pytest.approx(log3 / math.hypot(log3, 1), rel=1e-6)
    assert found.top1_agreement == 1.0  # the first of two equal logits is taken


def test_windows_count_by_their_tokens():
    source = [torch.zeros(3, 2), torch.zeros(1, 2)]
    quantized = [torch.zeros(3, 2), torch.tensor([[0.0, 2.0]])]
    found = compare_logits(source, quantized)
    last = compare_logits(source[1:], quantized[1:])
    assert found.kl == pytest.approx(last.kl / 4)
    assert found.top1_agreement == 0.75


def test_hidden_states_have_no_probabilities():
    found = compare_logits([torch.ones(2, 4)], [torch.full((2, 4), 1.5)], are_logits=False)
    assert (found.relative_error, found.kl, found.top1_agreement) == (0.5, None, None)
