"""OffloadedShards: frozen shards in a file compute and train as those in memory, and are never copied out of it."""

import errno
import gc
import os
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bigq
from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model, memory_footprint
from bigq.offload.space import is_file_backed
from processes_of_mesh import (
    IDS,
    STACKS,
    Net,
    empty_net,
    error_of,
    held_by_all,
    load_net,
    mesh_of,
    own_device,
    run_ranks,
)

peft = pytest.importorskip("peft")

FORMATS = {"nf4-double-quant": NF4(double_quant=True), "int8": Int8()}


def _config(name="nf4-double-quant"):
    """Of double quantization, the scales are finished last; of int8, with the codes."""
    return QuantizationConfig(FORMATS[name], also_quantize=STACKS)


def _sharding(mesh, *, blocks=None, rest=None, adapter=True):
    """A `shard` that gives the blocks and the rest of a model these policies, and None none."""
    from torch.distributed.fsdp import OffloadPolicy, fully_shard

    def shard(model):
        if adapter:
            torch.manual_seed(1)
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up", "down", "head"]))
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[0].endswith("blocks"):
                fully_shard(module, mesh=mesh, offload_policy=blocks or OffloadPolicy())
        return fully_shard(model, mesh=mesh, offload_policy=rest or OffloadPolicy())

    return shard


def _trained(model):
    """Outputs, gradients and adapter of two steps, as whole tensors on the CPU."""
    # What is offloaded is updated on the CPU: with a power of two, a GPU's update has the same bits.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2**-3)
    found = []
    for _ in range(2):
        out = model(IDS.to(own_device()))
        out.square().mean().backward()
        found += [out.detach(), *(_whole(p.grad) for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(_whole(p.detach()) for p in model.parameters() if p.requires_grad)]


def _whole(tensor):
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _are_equal(tensors, others):
    return len(tensors) == len(others) > 0 and all(map(torch.equal, tensors, others))


def _mapped(folder):
    """The addresses at which this process has mapped files in `folder`, from the operating system's own list."""
    with open("/proc/self/maps") as lines:
        found = [line.split() for line in lines if os.path.join(folder, "") in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in found]
    return [range(*ends) for ends in ranges], {line[5] for line in found}, {line[4] for line in found}


def _is_file_backed(shard):
    """Of a shard without rows, there is nothing that could be elsewhere."""
    local = shard.to_local()
    return is_file_backed(local) or (not local.numel() and not shard.requires_grad)


def _open_files(folder):
    paths = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return [target for path in paths if os.path.lexists(path) and (target := os.readlink(path)).startswith(folder)]


def _addresses(model):
    """{name: where the shard is, and where FSDP2 reads what it sends} of all shards that FSDP2 keeps on the CPU."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for module in model.modules():
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        for shard in getattr(getattr(state, "_fsdp_param_group", None), "fsdp_params", ()):
            if shard.offload_to_cpu:
                parameter = getattr(shard._module_info.module, shard._module_info.param_name)
                start, sent = parameter.to_local().untyped_storage().data_ptr(), shard._sharded_param_data
                found[names[id(parameter)]] = not parameter.requires_grad, start, sent.data_ptr(), sent.nbytes
    return found


@contextmanager
def _replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def _in_a_file(folder, off):
    """What a model with frozen shards in a file has in common with one whose shards are on its device."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    mesh, found = mesh_of(2), {}
    policy = CPUOffloadPolicy(pin_memory=False)
    for name in FORMATS:
        gc.collect()  # FSDP2 keeps a model in cycles
        plain = load_net(folder, _config(name), mesh=mesh, shard=_sharding(mesh))
        model = load_net(
            folder, _config(name), mesh=mesh, offload_folder=off, shard=_sharding(mesh, blocks=policy, rest=policy)
        )
        ranges, files, inodes = _mapped(off)
        before = _addresses(model)
        expected = held_by_all(plain)
        same = {key: torch.equal(tensor, expected[key]) for key, tensor in held_by_all(model).items()}
        same["keys"] = same.keys() == expected.keys()
        trains = _are_equal(_trained(model), _trained(plain))
        model.reshard()  # which leaves the outermost module whole
        after = _addresses(model)
        in_file = {key for key, (_, start, *_) in after.items() if any(start in each for each in ranges)}
        found[name] = {
            "different": [key for key, is_same in same.items() if not is_same],
            "trains": trains,
            "files": len(files) == len(inodes) == 1 and files.pop().startswith(os.path.join(off, ".bigq-")),
            "listed": os.listdir(off),
            "in file": in_file == {key for key, (frozen, *_) in after.items() if frozen},
            "sends": {key for key, (_, _, sent, _) in after.items() if any(sent in each for each in ranges)} == in_file,
            "as before": [key for key in in_file if before[key] != after[key]],
            "count": len(in_file),
            "in memory": len(after) - len(in_file),
            "footprint": memory_footprint(model).nbytes,
            "devices": {m.name: m.device for m in model.base_model.model.quantization_report.modules},
        }
        del model, plain
        gc.collect()
        found[name]["left"] = _mapped(off)[0], _open_files(off)
    return found


def _without_shard(folder, off):
    """A folder alone: bigq shards the model itself. And a merge into weights in a file."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    mesh = mesh_of(2)
    whole, model = (
        load_net(folder, _config(), device_map=own_device()),
        load_net(folder, _config(), mesh=mesh, offload_folder=off),
    )
    shards = {name: p for name, p in model.named_parameters() if hasattr(p, "to_local")}
    found = {
        "outputs": torch.equal(model(IDS.to(own_device())), whole(IDS.to(own_device()))),
        "wrong": [name for name, p in shards.items() if _is_file_backed(p) is p.requires_grad],
        "kinds": {(p.device.type, p.requires_grad) for p in shards.values()},
    }
    policy = CPUOffloadPolicy(pin_memory=False)
    frozen = empty_net().requires_grad_(False)
    frozen = load_and_quantize_model(frozen, folder, _config(), progress=False, mesh=mesh, offload_folder=off)
    found["all frozen"] = all(_is_file_backed(p) for p in frozen.parameters() if hasattr(p, "to_local"))
    found["frozen outputs"] = torch.equal(frozen(IDS.to(own_device())), whole(IDS.to(own_device())))
    bigq.save_quantized(frozen, f"{folder}/saved")
    again = load_net(f"{folder}/saved", None, device_map=own_device())
    found["saved"] = torch.equal(again(IDS.to(own_device())), whole(IDS.to(own_device())))
    shard = _sharding(mesh, blocks=policy, rest=policy)
    adapted = load_net(folder, _config("int8"), mesh=mesh, offload_folder=off, shard=shard)
    plain = load_net(folder, _config("int8"), mesh=mesh, shard=_sharding(mesh))
    for each in (adapted, plain):
        for name, parameter in each.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter.to_local(), 0.25)
        each.merge_adapter()
    merged = [{n: t for n, t in held_by_all(each).items() if "_packed" in n} for each in (adapted, plain)]
    found["merged"] = all(torch.equal(merged[0][name], merged[1][name]) for name in merged[1])
    found["merge changed"] = any(
        not torch.equal(tensor, whole_tensor)
        for tensor, whole_tensor in zip(merged[0].values(), _packed_of(folder), strict=True)
    )
    return found


def _packed_of(folder):
    state = load_net(folder, _config("int8"), device_map=own_device()).state_dict()
    return [tensor for name, tensor in state.items() if "_packed" in name]


def _when_finished(folder, off):
    """Which tensors of weights are in the file when all have been read, and before any is put into the model."""
    from bigq.loading import sharded_model

    early = {}
    commit = sharded_model.ShardedTensors.commit

    def look(self, shards, jobs, gathers):
        placed = [job._placed for job in jobs if isinstance(job._placed, dict)]
        early.update({name: is_file_backed(tensor) for tensors in placed for name, tensor in tensors.items()})
        commit(self, shards, jobs, gathers)

    with _replaced(sharded_model.ShardedTensors, "commit", look):
        load_net(folder, _config(), mesh=mesh_of(2), offload_folder=off)
    return early


def _lent(folder, off):
    """Whether a load lends memory of results to what is read, before the model is sharded and after that."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    from bigq.loading import fill

    stream, told, nbytes, found = fill.stream, [], [0], {}

    def watched(*arguments):
        *others, lent_nbytes = arguments
        told.append(lent_nbytes(own_device()) > 0)
        nbytes[0] = 0  # of what is given back
        for pieces in stream(*others):
            yield pieces
            told.append(lent_nbytes(own_device()) > 0)

    policy = CPUOffloadPolicy(pin_memory=False)
    cases = {
        "on the device": {},
        "on the disk": {"offload_folder": off},
        "on the CPU": {"shard": _sharding(mesh_of(2), blocks=policy, adapter=False)},
    }
    with _replaced(fill, "stream", watched), _replaced(fill.WeightJob, "lent_nbytes", lambda job, run: nbytes[0]):
        for name, arguments in cases.items():
            nbytes[0] = 100
            load_net(folder, _config(), mesh=mesh_of(2), **arguments)
            found[name] = told[:2]  # later ones are of what is read again
            told.clear()
    return found


def _refuse(rank, folder, off):
    """What all processes say where nothing goes to a file, or the disk of the second one is full; and what is left."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = mesh_of(2)
    pinned, unpinned = CPUOffloadPolicy(), CPUOffloadPolicy(pin_memory=False)

    def trained(model):
        fully_shard(model.blocks[0].norm, mesh=mesh, offload_policy=unpinned)
        fully_shard(model, mesh=mesh)

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(model):
        _sharding(mesh, blocks=unpinned, adapter=False)(model)
        if rank == 1:
            raise RuntimeError("no")

    model, said = empty_net(), {}
    load = partial(load_and_quantize_model, model, folder, _config(), progress=False, mesh=mesh, offload_folder=off)
    said["no policy"] = error_of(partial(load, shard=_sharding(mesh, adapter=False)))
    said["pinned"] = error_of(partial(load, shard=_sharding(mesh, blocks=pinned, adapter=False)))
    said["trained"] = error_of(partial(load, shard=trained))
    said["fails"] = error_of(partial(load, shard=fails))
    with _replaced(os, "posix_fallocate", full if rank == 1 else os.posix_fallocate):
        said["full"] = error_of(load)
    nan = partial(load_and_quantize_model, model, f"{folder}/nan", _config(), progress=False, mesh=mesh)
    said["nan"] = error_of(partial(nan, offload_folder=off))
    gc.collect()
    undone = type(model.blocks[0].up) is nn.Linear and all(p.is_meta for p in model.parameters())
    left = os.listdir(off), _mapped(off)[0], _open_files(off)
    loaded = load()
    whole = load_net(folder, _config(), device_map=own_device())
    ids = IDS.to(own_device())
    return {**said, "undone": undone, "left": left, "then": torch.equal(loaded(ids), whole(ids))}


def _work(rank, folder, off):
    warnings.simplefilter("error")
    return {
        "refused": _refuse(rank, folder, off),
        "in a file": _in_a_file(folder, off),
        "without shard": _without_shard(folder, off),
        "when finished": _when_finished(folder, off),
        "lent": _lent(folder, off),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory, nccl):
    folder, off = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("off")
    torch.manual_seed(0)
    state = Net().to(torch.bfloat16).state_dict()
    state["steps"] = torch.tensor(7)
    del state["head.weight"]  # the embedding's
    save_file(state, folder / "model.safetensors")
    (folder / "nan").mkdir()
    state["blocks.1.up.weight"][-1, 0] = float("nan")
    save_file(state, folder / "nan" / "model.safetensors")
    # PEFT merges into weights that are not quantized where they are, and NCCL gathers nothing of the CPU.
    group = {"world": 2, "gpus": nccl, "backend": "cpu:gloo,cuda:nccl"}
    return run_ranks(_work, tmp_path_factory.mktemp("ranks"), str(folder), str(off), **group)


@pytest.mark.parametrize("name", FORMATS)
def test_frozen_shards_in_a_file_have_the_bytes_of_those_in_memory_and_train_as_they_do(found, name):
    for each in (each["in a file"][name] for each in found):
        assert each["different"] == []
        assert each["trains"]


@pytest.mark.parametrize("name", FORMATS)
def test_all_that_is_frozen_stays_in_one_unnamed_file_through_training(found, name):
    for each in (each["in a file"][name] for each in found):
        assert each["files"]
        assert each["listed"] == []
        assert each["in file"]
        assert each["sends"], "also shards of fewer rows than those of the other process"
        assert each["as before"] == []
        assert each["count"] > 30
        assert each["in memory"] == 10  # an A and a B of 5 linears


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_goes_with_the_model(found, name):
    assert [each["in a file"][name]["left"] for each in found] == [([], [])] * 2


@pytest.mark.parametrize("name", FORMATS)
def test_the_footprint_and_the_report_say_what_is_on_the_disk(found, name):
    for each in (each["in a file"][name] for each in found):
        assert all(each["footprint"]["disk"].values())
        assert not any(kinds["packed"] for place, kinds in each["footprint"].items() if place != "disk")
        assert each["devices"]["blocks.0.up"] == each["devices"]["experts"] == "disk"


def test_a_folder_alone_offloads_what_is_frozen_in_the_blocks_and_the_rest(found):
    for each in (each["without shard"] for each in found):
        assert each["outputs"]
        assert each["wrong"] == []
        assert each["kinds"] == {("cpu", False), ("cpu", True)}
        assert each["all frozen"]
        assert each["frozen outputs"]
        assert each["saved"]


def test_an_adapter_is_merged_into_weights_in_a_file(found):
    for each in (each["without shard"] for each in found):
        assert each["merged"]
        assert each["merge changed"]


def test_codes_are_in_the_file_as_soon_as_they_are_made_and_scales_once_they_are_gathered(found):
    for early in (each["when finished"] for each in found):
        codes = {name for name in early if name.endswith("_packed") and ".one." not in name}  # it is whole, of one row
        assert all(early[name] for name in codes)
        assert len(codes) == 8
        assert not any(is_there for name, is_there in early.items() if name.endswith("_absmax"))


def test_memory_of_results_is_lent_only_if_they_stay_on_the_device(found):
    for each in found:
        expected = {"on the device": [True, True], "on the disk": [False, False], "on the CPU": [True, False]}
        assert each["lent"] == expected


@pytest.mark.parametrize(
    "case, words",
    [
        ("no policy", "no module was sharded with a CPUOffloadPolicy"),
        ("pinned", "FSDP2 would pin all shards in memory"),
        ("trained", "all shards on the CPU are trained"),
    ],
)
def test_a_folder_in_which_nothing_would_be_is_refused(found, case, words):
    for said in (each["refused"][case] for each in found):
        assert said.startswith("ConfigError: offload_folder is ")
        assert words in said
        assert "offload_policy=CPUOffloadPolicy(pin_memory=False)" in said


def test_an_error_in_one_process_leaves_both_models_as_they_were_and_no_file(found):
    first, second = (each["refused"] for each in found)
    assert second["full"].startswith("PlacementError: offload_folder ")
    assert "No space left on device" in second["full"]
    assert first["full"].startswith("PlacementError: process 1 failed, so no process has loaded anything: offload_fo")
    assert second["fails"] == "RuntimeError: no"
    assert first["fails"].startswith("BigqError: process 1 failed")
    assert second["nan"].startswith("CheckpointError: 1 weights hold NaN or Inf")
    assert first["nan"].startswith("CheckpointError: process 1 failed")
    for each in (first, second):
        assert each["undone"]
        assert each["left"] == ([], [], [])
        assert each["then"]
