"""Perplexity: windows, and the change with its standard error, by hand."""

import math

import pytest
import torch

from bigq.errors import ConfigError
from bigq.evaluation.perplexity import compare_losses, split_windows


def test_windows_hold_every_token_once():
    for first in (None, 9):
        for length in (2, 3, 5, 100):
            windows = split_windows(range(20), length, first)
            assert all(2 <= len(window) <= length for window in windows)
            bodies = [window[1:] if first == 9 else window for window in windows]
            tokens = torch.cat(bodies).tolist()
            assert tokens == list(range(len(tokens)))
            assert len(tokens) >= 19  # a last window of one token predicts nothing
            assert first is None or all(window[0] == 9 for window in windows)


@pytest.mark.parametrize("ids, length, first", [([], 8, None), ([5], 8, None), ([], 8, 1), ([5, 6], 1, None)], ids=str)
def test_what_predicts_nothing(ids, length, first):
    with pytest.raises(ConfigError, match="predict"):
        split_windows(ids, length, first)


def test_the_change_is_paired():
    source, quantized = [torch.tensor([1.0, 5.0]), torch.tensor([3.0])], [torch.tensor([2.0, 5.0]), torch.tensor([5.0])]
    found = compare_losses(source, quantized)
    assert (found.tokens, found.source_nats, found.quantized_nats, found.change_nats) == (3, 3.0, 4.0, 1.0)
    assert found.source == pytest.approx(math.exp(3))
    assert found.quantized == pytest.approx(math.exp(4))
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))  # differences 1, 0, 2: their deviation is 1


def test_one_token_has_no_standard_error():
    assert compare_losses([torch.tensor([1.0])], [torch.tensor([2.0])]).standard_error is None
