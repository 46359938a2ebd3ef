"""Rates of the drive, of copies and of products: they count what they say, and leave nothing."""

import pytest
import torch

from bigq.measuring import rates
from bigq.measuring.page_cache import file_system
from bigq.measuring.reading import Reading

CPU = torch.device("cpu")


def test_the_drive_is_read_once_and_left_empty(tmp_path, monkeypatch):
    got = []
    monkeypatch.setattr(rates, "read_into", lambda buffer, descriptor, at: got.append((at, len(buffer))) or len(buffer))
    nbytes = rates._CHUNK_NBYTES + 1000
    assert rates.disk_rate(tmp_path, nbytes).value > 0
    assert sorted(got) == [(0, rates._CHUNK_NBYTES), (rates._CHUNK_NBYTES, 1000)]
    assert not any(tmp_path.iterdir())


def test_a_file_that_gives_less_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "read_into", lambda buffer, descriptor, at: 0)
    with pytest.raises(OSError, match="gave 0 back"):
        rates.disk_rate(tmp_path, 1000)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        rates.disk_rate(tmp_path / "missing")


def test_what_a_second_moves_and_computes(monkeypatch):
    monkeypatch.setattr(
        rates, "read_call", lambda call, device, repeats: call() is None or Reading(value=0.5, spread=0.1)
    )
    assert rates.copy_rate(CPU, 1000) == Reading(value=2 * 1000 / 0.5, spread=0.1)
    assert rates.product_rate(CPU, 8, torch.float32) == Reading(value=2 * 8**3 / 0.5, spread=0.1)


def test_the_file_system_of_a_folder(tmp_path):
    assert file_system(tmp_path) == file_system(tmp_path / "missing" / "folder") != "unknown"


@pytest.mark.gpu
def test_the_link_of_a_gpu():
    rate = rates.link_rate(torch.device("cuda"), nbytes=1 << 26)
    assert 1e9 < rate.value < 1e12
