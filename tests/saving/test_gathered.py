"""A sharded model is gathered by all processes, also where the one that writes it runs out of host memory."""

import pytest
import torch

from processes_of_mesh import Net, error_of, run_ranks


def _gather(_):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from bigq.saving.gathered import gathered

    torch.manual_seed(0)
    model, other = Net(), Net()
    model.load_state_dict(other.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    before = dict(model.named_parameters())

    def gather():
        with gathered(model) as writes:
            pairs = zip(model.parameters(), other.parameters(), strict=True)
            return writes, [torch.equal(a, b) for a, b in pairs] if writes else []

    cpu, calls = torch.Tensor.cpu, iter(range(1 << 20))

    def fails(tensor):
        if next(calls) == 3:
            raise MemoryError("the host is full")
        return cpu(tensor)

    torch.Tensor.cpu = fails
    try:
        said = error_of(gather)
    finally:
        torch.Tensor.cpu = cpu
    same = all(before[name] is parameter for name, parameter in model.named_parameters())
    return said, same, gather()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return run_ranks(_gather, tmp_path_factory.mktemp("gathered"))


def test_one_process_gets_the_whole_model_in_host_memory(of_two):
    (_, _, (writes, equal)), (_, _, other) = of_two
    assert writes
    assert all(equal)
    assert len(equal) > 10
    assert other == (False, [])


def test_an_error_in_the_writing_process_lets_no_other_one_wait(of_two):
    assert [said for said, _, _ in of_two] == ["MemoryError: the host is full", ""]
    assert [same for _, same, _ in of_two] == [True, True]
