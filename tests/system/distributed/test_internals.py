"""Each private name of torch.distributed has a public way, and it is taken where torch has renamed it."""

import gc
import warnings
import weakref
from contextlib import suppress
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard

from bigq.system.distributed import internals
from ranks import run_ranks
from renamed_internals import NAMES, renamed

NAME = "bigq.system.distributed.internals"


@cache
def _on_cpu():
    """A linear whose shards FSDP2 keeps on the CPU, in a mesh of one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh, policy = torch.distributed.init_device_mesh("cpu", (1,)), CPUOffloadPolicy(pin_memory=False)
        return fully_shard(nn.Linear(2, 2, device="meta"), mesh=mesh, offload_policy=policy)
    finally:
        torch.distributed.destroy_process_group()


def _maker(module):
    """What `sharded_as` of this module takes, once it has made a part."""
    module.sharded_as(torch.ones(2, 2), _on_cpu().weight)
    return module._makers[0].__name__


def _gathers_from(module):
    """Whether FSDP2 sends the memory that this module tells it to."""
    linear, memory = _on_cpu(), torch.zeros(2, 2)
    if id(linear.weight) not in (shards := module.cpu_shards(linear)):
        return False
    shards[id(linear.weight)].gather_from(memory)
    (sent,) = (
        shard._sharded_param_data
        for shard in linear._get_fsdp_state()._fsdp_param_group.fsdp_params
        if shard.sharded_param is linear.weight
    )
    return sent.data_ptr() == memory.data_ptr()


def _mark_of_fsdp1(module, ignores=0):
    """The attributes at which this module says that FSDP1 flattens a module, when FSDP2 and FSDP1 shard one.

    The module has two Parameters of integers and a float, of which FSDP1 is to ignore the first ones.
    """
    found = []

    class Watched(nn.ParameterList):
        def __init__(self):
            codes = [nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False) for _ in range(2)]
            super().__init__([*codes, nn.Parameter(torch.zeros(2))])

        def __setattr__(self, name, value):
            if module.is_flattened_by_fsdp1(self, name):
                found.append(name)
            super().__setattr__(name, value)

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(Watched(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert found == []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a group of one process
            watched = Watched()
            with suppress(ValueError):  # FSDP1 flattens no integers
                FullyShardedDataParallel(watched, device_id=torch.device("cpu"), ignored_states=[*watched][:ignores])
    finally:
        torch.distributed.destroy_process_group()
    return found


def _gathers_one_by_one(module, device_type):
    """Whether a group of gloo gathers several tensors of such a device one by one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return isinstance(module.coalesced_gather(torch.distributed.group.WORLD, device_type), partial)
    finally:
        torch.distributed.destroy_process_group()


# What tells that a public way is taken, for each private name.
PUBLIC = {
    "_composable_state": lambda module: type(module._sharding_states()) is dict,
    "_distributed_c10d": lambda module: _gathers_one_by_one(module, "cpu"),
    "_dynamo_utils": lambda module: _mark_of_fsdp1(module) == [],
    "_fsdp_param_group": lambda module: module.cpu_shards(_on_cpu()) == {},
    "_get_fsdp_state": lambda module: module.cpu_shards(_on_cpu()) == {},
    "_ignored_params": lambda module: _mark_of_fsdp1(module) == [],
    "_is_fsdp_managed_module": lambda module: _mark_of_fsdp1(module) == [],
    "_module_state_mapping": lambda module: type(module._sharding_states()) is dict,
    "_sharded_param_data": lambda module: not _gathers_from(module),
    "_spec": lambda module: _maker(module) == "_from_local",
}


@pytest.fixture(params=[(), NAMES[NAME]], ids=["as-it-is", "all-renamed"])
def module(request):
    return renamed(NAME, *request.param)


needs_all = pytest.mark.skipif(internals.__spec__ is None, reason="all are renamed: tests/support/renamed_internals.py")


@needs_all
def test_this_torch_has_all_that_is_private():
    assert [name for name, is_public in PUBLIC.items() if is_public(internals)] == []


@pytest.mark.parametrize("name", NAMES[NAME])
def test_a_renamed_one_is_done_without(name):
    assert PUBLIC[name](renamed(NAME, name))


@needs_all
@pytest.mark.parametrize("ignores, flattened", [(0, True), (1, True), (2, False)])
def test_parameters_that_fsdp1_is_to_ignore_are_not_flattened(ignores, flattened):
    assert _mark_of_fsdp1(internals, ignores) == ["_is_fsdp_managed_module"] * flattened


def test_to_ask_who_sets_an_attribute_keeps_no_frame_alive():
    class Watched(nn.Linear):
        def __setattr__(self, name, value):
            internals.is_flattened_by_fsdp1(self, name)
            super().__setattr__(name, value)

    def mark():
        held = nn.Linear(1, 1)
        Watched(1, 1)._is_fsdp_managed_module = True  # as FSDP2 does
        return weakref.ref(held)

    gc.disable()
    try:
        assert mark()() is None
    finally:
        gc.enable()


def test_shards_that_fsdp2_keeps_on_the_cpu_are_found_or_none_is(module):
    linear = _on_cpu()
    found = {key: (shard.is_pinned, shard.rows) for key, shard in module.cpu_shards(linear).items()}
    assert found in ({}, {id(linear.weight): (False, 2), id(linear.bias): (False, 2)})
    assert module.cpu_shards(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("rows", [2, 0], ids=["rows", "no-rows"])
def test_a_part_of_a_dtensor_is_one_as_torch_makes_it(module, rows):
    like, own = _on_cpu().weight, torch.ones(2, 2)[:rows]
    made, expected = module.sharded_as(own, like), internals._from_local(own, like)
    assert torch.equal(made.to_local(), expected.to_local())
    assert repr(made) == repr(expected)
    assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert not made.requires_grad


def _gathered(rank):
    """What both ways gather from two processes, which send 3 and 5 bytes each."""
    found = []
    for module in (internals, renamed(NAME, "_distributed_c10d")):
        outputs = [torch.zeros(2 * size, dtype=torch.uint8) for size in (3, 5)]
        inputs = [torch.arange(size, dtype=torch.uint8) + 10 * rank for size in (3, 5)]
        module.coalesced_gather(torch.distributed.group.WORLD, "cpu")(outputs, inputs)
        found.append(outputs)
    return found


def test_several_gathers_at_once_are_those_one_by_one(tmp_path):
    for ways in run_ranks(_gathered, tmp_path):
        for small, large in ways:
            assert small.tolist() == [0, 1, 2, 10, 11, 12]
            assert large.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


@needs_all
def test_gloo_gathers_from_gpus_one_by_one():
    assert [_gathers_one_by_one(internals, device_type) for device_type in ("cpu", "cuda", "xpu")] == [
        False,
        True,
        True,
    ]
