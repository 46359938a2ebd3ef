"""run_ranks: processes that wait for each other in vain say where, and the test fails."""

import pytest
import torch

from ranks import run_ranks


def _wait_in_vain(rank):
    if rank == 0:
        torch.distributed.barrier()
    else:
        torch.distributed.recv(torch.zeros(1), src=0)


@pytest.mark.slow
def test_processes_that_wait_in_vain_end_and_say_where(tmp_path, capfd):
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_ranks(_wait_in_vain, tmp_path, patience_s=15)
    assert "in _wait_in_vain" in capfd.readouterr().err
