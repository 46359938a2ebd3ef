"""LocalFile: opened at the first read, checked, shared by threads, closed by whoever leaves it last."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bigq.checkpoint import LocalFile, ReadError, local_file
from bigq.errors import CheckpointError

CONTENT = bytes(range(200))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def descriptors(monkeypatch):
    """Tells which files are open now, of all that LocalFile opened."""
    files, plain_open = [], local_file.open_unchanged

    def opened(path, nbytes, identity):
        files.append(plain_open(path, nbytes, identity))
        return files[-1]

    monkeypatch.setattr(local_file, "open_unchanged", opened)
    return lambda: [file for file in files if not file.closed]


def read(file, offset, nbytes):
    buffer = bytearray(nbytes)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def test_it_is_opened_at_the_first_read_and_again_after_it_was_closed(path, descriptors):
    file = LocalFile(path, 200)
    assert (file.name, file.nbytes, file.path) == (str(path), 200, path)
    assert descriptors() == []
    for _ in range(2):
        assert read(file, 10, 20) == CONTENT[10:30]
        assert read(file, 190, 10) == CONTENT[190:]
        assert len(descriptors()) == 1
        file.close()
        file.close()
        assert descriptors() == []


def test_one_that_nobody_closed_is_closed_when_it_goes(path, descriptors):
    file = LocalFile(path, 200)
    read(file, 0, 1)
    assert len(descriptors()) == 1
    del file
    assert descriptors() == []


def test_a_file_that_is_gone_or_changed_is_refused_at_the_first_read(path):
    with pytest.raises(CheckpointError, match=r"file changed after it was opened: it had 199 bytes and now has 200"):
        read(LocalFile(path, 199), 0, 1)
    with pytest.raises(CheckpointError, match=r"cannot open .*file\.no"):
        read(LocalFile(path.with_suffix(".no"), 200), 0, 1)


def test_a_file_cut_short_says_at_which_byte(path):
    file = LocalFile(path, 200)
    read(file, 0, 1)
    os.truncate(path, 150)
    with pytest.raises(ReadError, match=r"file ended at byte 150: it was cut short while it was read") as caught:
        read(file, 140, 20)
    assert (caught.value.at, caught.value.reason) == (150, None)
    file.close()


def test_what_the_system_cannot_read_is_an_error_that_names_file_and_byte(path, descriptors, monkeypatch):
    def failing(*args):
        raise OSError(errno.EIO, "Input/output error")

    file = LocalFile(path, 200)
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ReadError, match=r"cannot read .*file from byte 7 on: .*Input/output error") as caught:
        read(file, 7, 20)
    assert caught.value.at == 7
    file.close()
    assert descriptors() == []


def test_closing_lets_a_read_under_way_end_and_its_descriptor_live(path, descriptors, monkeypatch):
    preadv, in_read, go_on = os.preadv, threading.Event(), threading.Event()

    def slow(*args):
        in_read.set()
        assert go_on.wait(30)
        return preadv(*args)

    file = LocalFile(path, 200)
    monkeypatch.setattr(os, "preadv", slow)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, file, 50, 100)
        assert in_read.wait(30)
        file.close()
        assert len(descriptors()) == 1
        go_on.set()
        assert reading.result() == CONTENT[50:150]
    assert descriptors() == []


def test_threads_read_while_another_closes_it_again_and_again(path, descriptors):
    file, done = LocalFile(path, 200), threading.Event()

    def closing():
        while not done.is_set():
            file.close()

    closer = threading.Thread(target=closing)
    closer.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for offset, got in enumerate(pool.map(lambda i: read(file, i % 150, 50), range(600))):
                assert got == CONTENT[offset % 150 : offset % 150 + 50]
    finally:
        done.set()
        closer.join()
    file.close()
    assert descriptors() == []
