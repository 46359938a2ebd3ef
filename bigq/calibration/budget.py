"""choose: one option for each weight, so that errors add up to little and costs to no more than a budget."""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Option", "Step", "choose", "smallest", "upgrades"]


class Option(NamedTuple):
    """What a weight costs in one format, and its error there."""

    cost: int
    error: float


class Step(NamedTuple):
    """The weight at `place` is stored as its option `to` from now on."""

    place: int
    to: int


def smallest(options: Sequence[Sequence[Option]]) -> list[int]:
    """The cheapest option of each weight; of equally cheap ones that with the smallest error, then the first."""
    return [min(range(len(own)), key=lambda at, own=own: (*own[at], at)) for own in options]  # type: ignore[misc]


def upgrades(options: Sequence[Sequence[Option]], budget: int | None = None) -> Iterator[Step]:
    """Yield the steps from the smallest choice on: each time the one whose error drops most for a unit of cost.

    A step may pass over options of its weight. Only steps that still fit into `budget` are taken; None: all are.
    Weights of one rank keep their order, so equal arguments give equal steps.
    """
    now = smallest(options)
    left = None if budget is None else budget - sum(own[at].cost for own, at in zip(options, now, strict=True))
    heap: list[tuple[float, int, int, int]] = []

    def push(place: int) -> None:
        here = options[place][now[place]]
        for to, option in enumerate(options[place]):
            cost, drop = option.cost - here.cost, here.error - option.error
            if drop > 0 and cost >= 0:
                heapq.heappush(heap, (-drop / cost if cost else -float("inf"), place, to, now[place]))

    for place in range(len(options)):
        push(place)
    while heap:
        _, place, to, start = heapq.heappop(heap)
        if start != now[place]:
            continue  # the weight has moved since
        cost = options[place][to].cost - options[place][start].cost
        if left is not None:
            if cost > left:
                continue  # what is left only shrinks
            left -= cost
        now[place] = to
        push(place)
        yield Step(place, to)


def choose(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The option of each weight that the steps within `budget` end at."""
    chosen = smallest(options)
    for place, to in upgrades(options, budget):
        chosen[place] = to
    return chosen
