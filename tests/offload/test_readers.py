"""Readers: what they ask the system before they read, and that each read is done once."""

import threading

import pytest

from bigq.offload import readers
from bigq.offload.readers import Read, Readers


@pytest.fixture
def asked(monkeypatch):
    """How often the number of cores was asked for; there are three."""
    questions = []
    monkeypatch.setattr(readers, "usable_cores", lambda: questions.append(None) or 3)
    return questions


def test_without_reads_nothing_is_asked_and_no_thread_starts(asked):
    before = threading.active_count()
    Readers().start([])
    assert not asked
    assert threading.active_count() == before


def test_cores_are_asked_for_once_and_each_read_is_done(asked):
    done, ours = [], Readers()
    for first in range(0, 40, 10):
        reads = [Read(lambda number=number: done.append(number)) for number in range(first, first + 10)]
        ours.start(reads)
        for read in reads:
            read.wait()
            read.raise_error()
    assert sorted(done) == list(range(40))
    assert len(asked) == 1


def test_an_error_is_raised_where_the_read_is_waited_for():
    def fail():
        raise OSError("the drive is gone")

    failing, ours = Read(fail), Readers()
    ours.start([failing])
    failing.wait()
    with pytest.raises(OSError, match="the drive is gone"):
        failing.raise_error()
