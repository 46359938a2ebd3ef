"""Waiting and cleaning up under interrupts."""

import threading

import pytest

from bigq.system.interrupts import Latch, Worker, to_the_end
from interrupts import interrupted_at, points_of


def test_a_step_that_is_interrupted_runs_again_and_the_interrupt_is_raised_after_it():
    done = []

    def step():
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt("first")
        done.append("end")

    with pytest.raises(KeyboardInterrupt, match="first"):
        to_the_end(step)
    assert done == [0, 1, "end"]


def test_a_step_that_always_fails_ends():
    tries = []

    def step():
        tries.append(None)
        raise ValueError(len(tries))

    with pytest.raises(ValueError, match="1"):
        to_the_end(step)
    assert len(tries) == 3


def test_a_latch_lets_all_through_once_it_is_open():
    latch, through = Latch(), []
    threads = [threading.Thread(target=lambda: (latch.wait(), through.append(None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert not through
    assert not latch.is_open
    latch.open()
    for thread in threads:
        thread.join()
    latch.wait()
    assert len(through) == 4
    assert latch.is_open


def test_a_worker_that_was_not_started_has_ended():
    Worker(lambda: pytest.fail("runs")).join()


def test_joining_waits_for_the_work():
    done, go = [], Latch()
    worker = Worker(lambda: (go.wait(), done.append(None)))
    worker.start()
    assert not done
    go.open()
    worker.join()
    assert done == [None]


def test_a_worker_whose_start_was_interrupted_is_joined():
    points = points_of(Worker(lambda: None).start, ("system/interrupts",))
    assert any(point.position is not None for point in points)  # as the thread was started
    for point in points:
        done, go = [], Latch()
        worker = Worker(lambda go=go, done=done: (go.wait(), done.append(None)))
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(point, worker.start)
        go.open()
        worker.join()
        assert done == ([] if point.position is None else [None]), str(point)


def test_a_worker_that_gets_no_thread_has_ended(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    worker = Worker(lambda: pytest.fail("runs"))
    with pytest.raises(RuntimeError, match="new thread"):
        worker.start()
    worker.join()
