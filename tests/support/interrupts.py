"""Interrupts at exact points, instead of by a timer: a run of a test is then like every other.

CPython raises an interrupt as a Python function is entered and as a call of C code returns. A profiler is called at
both, and what it raises is raised there.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import bigq

_ROOT = str(Path(bigq.__file__).parent)


class Point(NamedTuple):
    """The entry of `code` at its `turn`-th call, or the return of a call in it, at the bytecode `position`."""

    code: CodeType
    position: int | None
    turn: int

    def __str__(self) -> str:
        where = "as it is entered" if self.position is None else f"after the call at {self.position}"
        return f"{self.code.co_filename}:{self.code.co_firstlineno} {self.code.co_name}, {where}, turn {self.turn}"


def points_of(call: Callable[[], object], folders: tuple[str, ...] = ("",)) -> list[Point]:
    """The points in `call` that are in code of bigq in `folders`, or in what it calls: the first and last turn of each.

    Those of other threads are left out: Python raises interrupts in the main thread.
    """
    found: Counter[tuple[CodeType, int | None]] = Counter()
    roots = tuple(f"{_ROOT}/{folder}" for folder in folders)

    def count(frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return"):
            callers = (frame, frame.f_back)
            if any(own is not None and own.f_code.co_filename.startswith(roots) for own in callers):
                found[_place(frame, event)] += 1

    _profiled(call, count)
    return [Point(*place, turn) for place, turns in found.items() for turn in sorted({1, turns})]


def interrupted_at(point: Point, call: Callable[[], object]) -> bool:
    """Run `call` with a KeyboardInterrupt at `point`; returns whether the point was reached. Raises what it raises."""
    turns = 0

    def interrupt(frame: FrameType, event: str, _: object) -> None:
        nonlocal turns
        if event in ("call", "c_return") and frame.f_code is point.code and _place(frame, event)[1] == point.position:
            turns += 1
            if turns == point.turn:
                raise KeyboardInterrupt(str(point))  # Python then ends the profiling

    _profiled(call, interrupt)
    return turns >= point.turn


def _place(frame: FrameType, event: str) -> tuple[CodeType, int | None]:
    return frame.f_code, None if event == "call" else frame.f_lasti


def _profiled(call: Callable[[], object], profiler: Callable[[FrameType, str, object], None]) -> None:
    before = sys.getprofile()
    try:
        sys.setprofile(profiler)
        call()
    finally:
        sys.setprofile(before)
