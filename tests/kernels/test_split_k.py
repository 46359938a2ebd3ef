"""How many programs share K, and that none of the ways to share it would be less work."""

from itertools import product

import pytest

from bigq_kernels.split_k import even_splits, split_steps
from bigq_kernels.tiles import ceil_div


@pytest.mark.parametrize(
    "tiles, steps, expected",
    [
        pytest.param(224, 16, (4, 4), id="14336x4096"),  # 7 programs of 4 steps; 2 of 16 and 4 of 8 are 32 steps
        pytest.param(64, 16, (4, 4), id="4096x4096"),
        pytest.param(64, 56, (4, 14), id="4096x14336"),
        pytest.param(1, 1, (1, 1), id="one-step"),
        pytest.param(1, 7, (4, 2), id="one-tile"),  # two steps at least
        pytest.param(100000, 16, (1, 16), id="full-without"),
    ],
)
def test_split(tiles, steps, expected):
    assert split_steps(tiles, steps, 132, 0.25) == expected


def test_no_split_is_better_by_the_rule():
    for case in product((1, 7, 64, 131, 224, 448), (1, 2, 5, 16, 33), (20, 78, 132)):
        tiles, steps, multiprocessors = case
        split, per_split = split_steps(*case, 0.25)
        assert (split - 1) * per_split < steps <= split * per_split, case
        programs = ceil_div(tiles * split, multiprocessors)
        for other in range(min(2, steps), steps + 1):
            others = ceil_div(tiles * ceil_div(steps, other), multiprocessors)
            assert (programs < 2) <= (others < 2), (case, other)
            assert (programs < 2) < (others < 2) or programs * (per_split + 0.25) <= others * (other + 0.25), case


@pytest.mark.parametrize(
    "steps, split, expected",
    [
        pytest.param(16, 4, (4, 4), id="even"),
        pytest.param(13, 4, (5, 3), id="the-last-would-have-one"),
        pytest.param(9, 4, (3, 3), id="rounded-up"),
        pytest.param(3, 2, (3, 1), id="too-few-for-two"),
    ],
)
def test_each_split_has_two_steps(steps, split, expected):
    assert even_splits(steps, split, least=2) == expected


def test_one_step_is_not_split():
    assert even_splits(1, 4, least=1) == (1, 1)
