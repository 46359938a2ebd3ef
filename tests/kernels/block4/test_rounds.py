"""Rounds: every step of every tile is done once, and no program has more than it should."""

from itertools import product

import pytest

from bigq_kernels.block4.rounds import LEAST_HELP, rounds_of


def spans(rounds, steps, program):
    """(tile, first step, step after the last) of each turn of a program, as in `_span` and `_turns` of wgmma_rounds."""
    programs, whole, rest, parts, helped, helped_more, each, more = rounds
    every = [(program + turn * programs, 0, steps) for turn in range(whole)]
    cut, helpers = whole * programs, programs - rest
    if parts > 1:
        part = program // rest
        return every + [(cut + program % rest, steps * part // parts, steps * (part + 1) // parts)] * (part < parts)
    if program < rest:
        stop = steps - (helped_more if helped and program % helpers < more else helped)
        return [*every, (cut + program, 0, stop)]
    helper = program - rest
    start = steps - (helped_more if helper < more else helped)
    return every + [(cut + helper + i * helpers, start, steps) for i in range(each + (helper < more))]


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 21, 56, 112])
def test_every_step_is_done_once(steps):
    for tiles, programs in product([*range(1, 40), 64, 112, 224, 1002], [1, 2, 3, 5, 8, 13, 33, 66, 132, 264]):
        rounds, case = rounds_of(tiles, steps, programs), (tiles, steps, programs)
        assert rounds.programs <= programs, case
        done = [0] * (tiles * steps)
        for program in range(rounds.programs):
            mine = spans(rounds, steps, program)
            for tile, start, stop in mine:
                assert 0 <= start < stop <= steps, case
                for step in range(start, stop):
                    done[tile * steps + step] += 1
            assert all(stop == steps for _, _, stop in mine[:-1]), case  # what others add to is the last turn
            is_cut = any(stop - start < steps for _, start, stop in mine)
            assert not is_cut or rounds.others, case
        assert done == [1] * (tiles * steps), case


@pytest.mark.parametrize(
    "tiles, steps, programs, most",
    [
        pytest.param(64, 16, 132, 8, id="two-parts"),
        pytest.param(32, 56, 132, 14, id="four-parts"),
        pytest.param(224, 32, 132, 57, id="helpers"),
        pytest.param(112, 16, 66, 29, id="helpers-of-a-second-round"),
        pytest.param(112, 16, 132, 16, id="too-few-helpers"),
        pytest.param(264, 16, 132, 32, id="whole-rounds"),
        pytest.param(3, 2, 132, 1, id="fewer-steps-than-programs"),
    ],
)
def test_steps_of_the_busiest_program(tiles, steps, programs, most):
    rounds = rounds_of(tiles, steps, programs)
    work = [sum(stop - start for _, start, stop in spans(rounds, steps, p)) for p in range(rounds.programs)]
    assert max(work) == most


def test_helpers_have_at_least_some_steps():
    for tiles, steps, programs in product(range(1, 300), (4, 16, 40), (66, 132)):
        rounds = rounds_of(tiles, steps, programs)
        assert rounds.helped == rounds.each == 0 or rounds.helped >= LEAST_HELP
        assert not rounds.more or rounds.helped_more >= LEAST_HELP
