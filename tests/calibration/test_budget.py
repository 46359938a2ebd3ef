"""choose and upgrades: errors under a budget, against all choices there are."""

import random
from itertools import product

import pytest

from bigq.calibration.budget import Option, choose, smallest, upgrades


def cost_and_error(options, picks):
    picked = [own[at] for own, at in zip(options, picks, strict=True)]
    return sum(option.cost for option in picked), sum(option.error for option in picked)


def best(options, budget):
    every = (cost_and_error(options, picks) for picks in product(*(range(len(own)) for own in options)))
    return min(error for cost, error in every if cost <= budget)


def test_equal_sizes_give_the_best_choice_there_is():
    rng = random.Random(0)
    for _ in range(200):
        errors = [(rng.random(), 0.01 * rng.random()) for _ in range(5)]
        options = [[Option(4, large), Option(8, small)] for large, small in errors]
        budget = rng.randint(20, 40)
        cost, error = cost_and_error(options, choose(options, budget))
        assert cost <= budget
        assert error == pytest.approx(best(options, budget), rel=1e-12)


def test_other_sizes_come_near_it():
    """The best choice fills what is left; a budget that is larger by the largest weight reaches its error."""
    rng = random.Random(1)
    for _ in range(200):
        options = [
            [Option(size, error), Option(2 * size, 0.006 * error), Option(4 * size, 0.0)]
            for size, error in ((rng.randint(1, 9), rng.random()) for _ in range(5))
        ]
        smallest_cost = sum(own[0].cost for own in options)
        budget = rng.randint(smallest_cost, 4 * smallest_cost)
        cost, error = cost_and_error(options, choose(options, budget))
        assert smallest_cost <= cost <= budget
        more = budget + max(own[-1].cost for own in options)
        assert cost_and_error(options, choose(options, more))[1] <= best(options, budget) + 1e-12
        assert error <= cost_and_error(options, smallest(options))[1]


def test_two_steps_at_once_where_the_first_alone_gains_little():
    options = [[Option(1, 1.0), Option(2, 0.99), Option(3, 0.0)]]
    assert list(upgrades(options)) == [(0, 2)]
    assert choose(options, 2) == [1], "the smaller step is taken where the larger one does not fit"


def test_an_option_that_costs_more_and_is_no_better_is_never_taken():
    options = [[Option(2, 0.5), Option(1, 0.4), Option(3, 0.4)]]
    assert smallest(options) == [1]
    assert choose(options, 100) == [1]


def test_equal_weights_are_taken_in_their_order():
    options = [[Option(1, 1.0), Option(2, 0.0)]] * 4
    assert choose(options, 6) == [1, 1, 0, 0]
    assert list(upgrades(options)) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_what_is_left_is_filled_by_weights_of_less_gain():
    options = [[Option(1, 1.0), Option(10, 0.0)], [Option(1, 0.01), Option(2, 0.0)]]
    assert choose(options, 5) == [0, 1]
