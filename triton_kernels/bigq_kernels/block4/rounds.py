"""Divide the tiles of a product over programs: rounds of whole tiles, then the rest, each of whose tiles several share.

Programs that do the same round read the same tokens at the same time, which takes less of L2 than equal shares of all
steps do: these begin anywhere in K. Only the tiles of the last round are cut, all at the same steps of K:

- If they are at most half as many as the programs, into `parts` equal parts.
- Otherwise each has a program, and the programs that would idle, the helpers, take the last steps of one tile after
  another.

The program with the beginning of a tile adds what the others computed.
"""

from functools import cache
from typing import NamedTuple

__all__ = ["Rounds", "rounds_of"]

# Steps that it costs a helper to store a part and to begin another, 256 x 128 (H200).
OVERHEAD = 1
LEAST_HELP = 2  # steps: with fewer, a tile is faster alone


class Rounds(NamedTuple):
    """How `programs` programs divide their tiles."""

    programs: int
    whole: int  # rounds of whole tiles
    rest: int  # tiles of the last round, which are cut
    parts: int  # of each of these; 1 if helpers help
    helped: int  # steps that helpers do of a tile, of those with fewer tiles
    helped_more: int  # of those with one tile more
    each: int  # tiles of a helper
    more: int  # helpers that have one more

    @property
    def others(self) -> int:
        """The most programs beside the first that have a part of a tile."""
        return self.parts - 1 if self.parts > 1 else int(self.helped > 0)


@cache
def rounds_of(tiles: int, steps: int, programs: int) -> Rounds:
    """For tiles of `steps` steps each, of which none may be empty."""
    programs = min(programs, tiles * steps)
    rounds, rest = divmod(tiles, programs)
    if rest == 0:
        return Rounds(programs, rounds, 0, 1, 0, 0, 0, 0)
    parts = min(programs // rest, steps)
    helpers = programs - rest
    if parts > 1 or helpers == 0:
        return Rounds(programs, rounds, rest, parts, 0, 0, 0, 0)
    each, more = divmod(rest, helpers)
    helped, helped_more = (max(0, (steps - k * OVERHEAD) // (k + 1)) for k in (each, each + 1))
    if min(helped, helped_more if more else helped) < LEAST_HELP:
        return Rounds(programs, rounds, rest, 1, 0, 0, 0, 0)
    return Rounds(programs, rounds, rest, 1, helped, helped_more, each, more)
