"""A load into shards: what all processes hold together has the bytes of a whole load, and all fail together."""

import warnings
from functools import partial

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

import bigq
from bigq import NF4, QuantizationConfig, load_and_quantize_model
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
from scaled_checkpoints import in_fp8, write

FORMATS = {
    "nf4": NF4(),
    "nf4-double-quant": NF4(double_quant=True),
    "fp4": bigq.FP4(block_size=32),
    "int8": bigq.Int8(),
}
OF_THREE = ("nf4-double-quant", "int8")


def _compare(folder, config, **arguments):
    """What a load into shards has in common with a whole one."""
    whole, model = load_net(folder, config, device_map=own_device()), load_net(folder, config, **arguments)
    expected, found = whole.state_dict(), held_by_all(model)
    sharded = {name for name, tensor in model.state_dict().items() if hasattr(tensor, "to_local")}
    read, whole_read = (
        sum(stage.nbytes for stage in each.quantization_report.stages if stage.name == "read")
        for each in (model, whole)
    )
    outputs, expected_outputs = _outputs(model), _outputs(whole)
    return {
        "names": list(found) == list(expected),
        "different": [name for name in expected if not _is_equal(found[name], expected[name])],
        "sharded": sharded,
        "read": read / whole_read if whole_read else None,  # an old pickle is mapped
        "outputs": torch.equal(outputs, expected_outputs),
        "mask": torch.equal(model.mask, whole.mask),
        "tied": model.head.weight_packed is model.embed.weight_packed
        if "head.weight_packed" in found
        else model.head.weight is model.embed.weight,
        "nbytes": sum(module.nbytes for module in model.quantization_report.modules),
        "whole nbytes": sum(module.nbytes for module in whole.quantization_report.modules),
    }


def _outputs(model):
    return model(IDS.to(own_device()))


def _read_nbytes(model):
    return sum(stage.nbytes for stage in model.quantization_report.stages if stage.name == "read")


def _is_equal(tensor, other):
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def _load_formats(world, folder, names):
    mesh = mesh_of(world)
    return {
        name: _compare(folder, QuantizationConfig(FORMATS[name], also_quantize=STACKS), mesh=mesh) for name in names
    }


def _load_otherwise(world, folder):
    """Other meshes, checkpoints and ways to shard."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    nf4, mesh = QuantizationConfig("nf4", also_quantize=STACKS), mesh_of(world)
    double = QuantizationConfig(NF4(double_quant=True), also_quantize=[*STACKS, "embed", "head"])
    names = ("replicas", "shards")
    found = {
        "hsdp": _compare(folder, nf4, mesh=mesh_of(1, world, mesh_dim_names=names)),
        "replicas": _compare(folder, nf4, mesh=mesh_of(world, 1, mesh_dim_names=names)),
        "quantized": _compare(f"{folder}/quantized", None, mesh=mesh),
        "pickle": _compare(f"{folder}/pickle", nf4, mesh=mesh),
        "codes": _compare(f"{folder}/codes", double, mesh=mesh),
    }
    moments = bigq.InputMoments(
        {
            f"{name}.weight": torch.linspace(0.1, 2, module.in_features)
            for name, module in Net().named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    for name, weight_format in (("search", NF4()), ("search-double-quant", NF4(double_quant=True))):
        config = QuantizationConfig(weight_format, method="search", moments=moments)
        found[name] = _compare(folder, config, mesh=mesh)

    def whole_groups(model):
        """Everything in one group, so that also what the default leaves whole is sharded; the outputs are bfloat16."""
        fully_shard(model, mesh=mesh)

    found["tied"] = _compare(folder, double, mesh=mesh)
    found["one-group"] = _compare(folder, double, mesh=mesh, shard=whole_groups)

    def some_whole(model):
        """What is expected to be sharded stays whole: a quantized weight, a kept one and a stack."""
        block = model.blocks[0]
        whole = {*block.up.parameters(), block.norm.weight, *model.experts.parameters()}
        fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)

    def replicas(model):
        """Over another mesh than expected: every process keeps all rows."""
        fully_shard(model, mesh=mesh_of(world, 1, mesh_dim_names=names))

    found["some-whole"] = _compare(folder, double, mesh=mesh, shard=some_whole)

    def on_cpu(model):
        policy = CPUOffloadPolicy(pin_memory=False)  # there may be no GPU to pin memory for
        fully_shard(model.blocks[0], mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh)

    found["kept-on-cpu"] = _compare(folder, double, mesh=mesh, shard=on_cpu)
    found["other-mesh"] = _compare(folder, double, mesh=mesh, shard=replicas)
    return found


class Stateful(Net):
    """A net whose second process does not take its extra state, which comes when all tensors are in place."""

    def get_extra_state(self):
        return torch.tensor(1)

    def set_extra_state(self, state):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("no state")


def _fail_in_one(rank, world, folder):
    """What the processes raise if the second one fails before the first step, and after the last; and what is left."""
    from torch.distributed.fsdp import fully_shard

    mesh, nf4 = mesh_of(world), QuantizationConfig("nf4")
    with init_empty_weights():
        late = Stateful()
    early = load_net(folder, nf4, device_map=own_device()) if rank == 1 else empty_net()
    said = [
        error_of(partial(load_and_quantize_model, model, location, nf4, progress=False, mesh=mesh))
        for model, location in ((early, folder), (late, f"{folder}/extra"))
    ]
    sharded = Net().to(own_device())
    fully_shard(sharded, mesh=mesh)
    before = _outputs(sharded)
    sharded.reshard()
    said.append(error_of(lambda: load_and_quantize_model(sharded, folder, nf4, progress=False, mesh=mesh)))
    return [
        *said,
        torch.equal(_outputs(sharded), before),
        type(late.blocks[0].up) is nn.Linear and late.blocks[0].up.weight.is_meta,
    ]


def _fail_while_gathering(rank, world, folder):
    """What the processes raise if the second one fails while scales are gathered and committed; and what is left."""
    from bigq.loading import gathers, sharded_model

    mesh, double = mesh_of(world), QuantizationConfig(NF4(double_quant=True), also_quantize=STACKS)
    places = {
        "memory for the gathers": (gathers, "_memory", 1),
        "the third gather": (gathers.Gathers, "_gather", 3),
        "the second weight": (sharded_model, "_finish", 2),
        "the last weight": (sharded_model, "_finish", 8),  # 3 linears in each of 2 blocks, and 2 stacks
        "the tenth tensor": (sharded_model, "sharded_as", 10),
    }
    said = {}
    for name, (owner, attribute, count) in places.items():
        model, function = empty_net(), getattr(owner, attribute)
        if rank == 1:
            setattr(owner, attribute, _failing(function, count))
        try:
            error = error_of(lambda m=model: load_and_quantize_model(m, folder, double, progress=False, mesh=mesh))
        finally:
            setattr(owner, attribute, function)
        undone = type(model.blocks[0].up) is nn.Linear and all(p.is_meta for p in model.parameters())
        said[name] = error, undone and not hasattr(model.blocks[0], "unshard")
    loaded = load_and_quantize_model(model, folder, double, progress=False, mesh=mesh)
    said["then"] = torch.equal(_outputs(loaded), _outputs(load_net(folder, double, device_map=own_device())))
    return said


def _failing(function, count):
    """`function`, which runs out of memory at its call number `count`."""
    calls = iter(range(1, 1 << 20))

    def fails(*arguments):
        if next(calls) == count:
            raise torch.OutOfMemoryError("no memory")
        return function(*arguments)

    return fails


def _refuse(rank, world, folder):
    """What is refused, in all processes, and whether the model is as it was then."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh, nf4 = mesh_of(world), QuantizationConfig("nf4")
    second = rank == 1

    def fails(model):
        fully_shard(model.blocks[0], mesh=mesh)
        if second:
            raise RuntimeError("no")
        fully_shard(model, mesh=mesh)

    def by_columns(model):
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape == (101, 64) else None)

    def adds(model):
        model.extra = nn.Parameter(torch.empty(3, device="meta"))
        fully_shard(model, mesh=mesh)

    def replaces(model):
        model.blocks[0].up = nn.Linear(64, 513)
        fully_shard(model, mesh=mesh)

    def differs(model):
        if second:
            fully_shard(model.blocks[0], mesh=mesh)
        fully_shard(model.blocks[1], mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set() if second else set(model.blocks[0].parameters()))

    cases = {
        "missing": (f"{folder}/none" if second else folder, nf4, {}),
        "nan": (f"{folder}/nan", nf4, {}),
        "fails": (folder, nf4, {"shard": fails}),
        "config": (folder, QuantizationConfig("fp4") if second else nf4, {}),
        "columns": (folder, nf4, {"shard": by_columns}),
        "adds": (folder, nf4, {"shard": adds}),
        "replaces": (folder, nf4, {"shard": replaces}),
        "differs": (folder, QuantizationConfig("nf4", double_quant=True), {"shard": differs}),
        "device": (folder, nf4, {"device_map": "cpu"}),
        "offload": (folder, nf4, {"offload": "quantized"}),
        "limits": (folder, nf4, {"max_memory": {0: "1GB"}}),
        "in place": (None, nf4, {}),
    }
    model = empty_net()
    before = [(name, type(module), {**vars(module)}) for name, module in model.named_modules()]
    held = dict(model.named_parameters())
    said = {}
    for name, (location, config, arguments) in cases.items():
        said[name] = error_of(
            lambda c=config, w=location, a=arguments: load_and_quantize_model(
                model, w, c, progress=False, mesh=mesh, **a
            )
        )
        after = [(name, type(module), {**vars(module)}) for name, module in model.named_modules()]
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks]
        same = [a == b for (*a, _), (*b, _) in zip(before, after, strict=True)]
        same += [a.keys() == b.keys() for (*_, a), (*_, b) in zip(before, after, strict=True)]
        same += [held.get(name) is parameter for name, parameter in model.named_parameters()]
        said[name] += "" if all(same) and not hooks else " AND CHANGED THE MODEL"
    said["mesh"] = error_of(lambda: load_and_quantize_model(model, folder, nf4, mesh="cpu"))
    nameless = mesh_of(1, world)
    said["nameless"] = error_of(lambda: load_and_quantize_model(model, folder, nf4, mesh=nameless))
    said["shard alone"] = error_of(lambda: load_and_quantize_model(model, folder, nf4, shard=by_columns))
    loaded = load_and_quantize_model(model, folder, nf4, progress=False, mesh=mesh)
    said["loaded"] = error_of(lambda: load_and_quantize_model(loaded, folder, nf4, mesh=mesh))
    said["then"] = torch.equal(_outputs(loaded), _outputs(load_net(folder, nf4, device_map=own_device())))
    return said


def _work(rank, world, folder):
    warnings.simplefilter("error")
    if world == 3:
        return _load_formats(world, folder, OF_THREE)
    return {
        "formats": _load_formats(world, folder, FORMATS),
        "otherwise": _load_otherwise(world, folder),
        "refused": _refuse(rank, world, folder),
        "fail in one": _fail_in_one(rank, world, folder),
        "while gathering": _fail_while_gathering(rank, world, folder),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in bfloat16; the same quantized, as an old pickle, and with a NaN in the last row of a weight."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    state = Net().to(torch.bfloat16).state_dict()
    state["steps"] = torch.tensor(7)
    del state["head.weight"]  # the embedding's
    bad = {**state, "blocks.1.up.weight": state["blocks.1.up.weight"].clone()}
    bad["blocks.1.up.weight"][-1, 0] = float("nan")
    for name in ("quantized", "pickle", "nan", "extra"):
        (folder / name).mkdir()
    save_file(state, folder / "model.safetensors")
    save_file({**state, "_extra_state": torch.tensor(1)}, folder / "extra" / "model.safetensors")
    save_file(bad, folder / "nan" / "model.safetensors")
    torch.save(state, folder / "pickle" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    codes = dict(state)
    for name in [name for name, tensor in state.items() if tensor.ndim > 1 and len(tensor) > 1]:
        codes[name], codes[f"{name}_scale_inv"] = in_fp8(state[name], (32, 64))
    write(folder / "codes", codes, {"quant_method": "fp8", "weight_block_size": [32, 64]})
    config = QuantizationConfig(NF4(double_quant=True), also_quantize=STACKS)
    bigq.save_quantized(load_net(folder, config, device_map="cpu"), folder / "quantized")
    return folder


@pytest.fixture(scope="module")
def of_two(checkpoint, tmp_path_factory, nccl):
    return run_ranks(_work, tmp_path_factory.mktemp("two"), 2, str(checkpoint), world=2, gpus=nccl)


@pytest.fixture(scope="module")
def of_three(checkpoint, tmp_path_factory, nccl):
    return run_ranks(_work, tmp_path_factory.mktemp("three"), 3, str(checkpoint), world=3, gpus=nccl)


def _is_as_whole(found):
    return found["names"] and not found["different"] and found["outputs"] and found["mask"] and found["tied"]


@pytest.mark.parametrize("name", FORMATS)
def test_two_processes_hold_the_bytes_of_one(of_two, name):
    for found in (each["formats"][name] for each in of_two):
        assert _is_as_whole(found), found
        assert {"experts.up_packed", "experts.down_absmax", "blocks.0.up.weight_packed", "gain"} <= found["sharded"]
        assert not {name for name in found["sharded"] if "quant_state" in name or "offset" in name}
        assert 0.45 < found["read"] < 0.6  # of 5 experts, a process has 3 or 2


@pytest.mark.slow  # 18 s of CPU time
@pytest.mark.parametrize("name", OF_THREE)
def test_three_processes_hold_the_bytes_of_one(of_three, name):
    for found in (each[name] for each in of_three):
        assert _is_as_whole(found), found
        assert 0.2 < found["read"] < 0.45  # of 5 experts, a process has 2 or 1


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_counts_the_bytes_of_the_process(of_two, name):
    found = [each["formats"][name] for each in of_two]
    assert sum(each["nbytes"] for each in found) < 1.2 * found[0]["whole nbytes"]


@pytest.mark.parametrize(
    "name",
    [
        "hsdp",
        "replicas",
        "quantized",
        "pickle",
        "codes",
        "search",
        "search-double-quant",
        "tied",
        "one-group",
        "some-whole",
        "kept-on-cpu",
        "other-mesh",
    ],
)
def test_every_way_to_load_and_to_shard_holds_the_bytes_of_one_process(of_two, name):
    for found in (each["otherwise"][name] for each in of_two):
        assert _is_as_whole(found), found


def test_replicas_read_everything_and_shards_their_part(of_two):
    for found in (each["otherwise"] for each in of_two):
        assert found["replicas"]["read"] == 1
        assert found["hsdp"]["read"] < 0.6
        assert found["quantized"]["read"] < 0.6
        assert found["codes"]["read"] < 0.6
        assert any("quant_state" in name for name in found["one-group"]["sharded"])
        assert found["some-whole"]["read"] > 0.6  # rows of what stays whole were read first, in vain
        assert not {"blocks.0.up.weight_packed", "experts.up_absmax"} & found["some-whole"]["sharded"]
        assert found["other-mesh"]["read"] > 1.4


@pytest.mark.parametrize(
    "case, kind, words",
    [
        ("missing", "CheckpointError", "none"),
        ("nan", "CheckpointError", "blocks.1.up.weight"),
        ("config", "CheckpointError", "the processes of the mesh have 2 different plans"),
        ("columns", "UnsupportedError", "is sharded as"),
        ("adds", "UnsupportedError", "1 tensors on meta were added by shard(model)"),
        ("replaces", "UnsupportedError", "blocks.0.up.weight_packed"),
        ("differs", "CheckpointError", "2 different sets of sharded tensors"),
        ("device", "ConfigError", "device_map is 'cpu' and mesh is given"),
        ("offload", "ConfigError", "offload is 'quantized' and mesh is given"),
        ("limits", "ConfigError", "max_memory is {0: '1GB'} and mesh is given"),
        ("in place", "ConfigError", "a load into shards reads a checkpoint"),
        ("mesh", "ConfigError", "mesh is 'cpu'; expected a DeviceMesh"),
        ("nameless", "ConfigError", "has no names for its dimensions"),
        ("shard alone", "ConfigError", "pass the mesh"),
        ("loaded", "UnsupportedError", "the model is quantized already"),
    ],
)
def test_what_is_refused_is_refused_in_all_processes(of_two, case, kind, words):
    for said in (each["refused"][case] for each in of_two):
        assert said.startswith(f"{kind}: ")
        assert words in said
        assert "AND CHANGED THE MODEL" not in said


def test_an_error_is_told_to_the_other_processes(of_two):
    first, second = (each["refused"] for each in of_two)
    assert second["fails"] == "RuntimeError: no"
    assert first["fails"] == "BigqError: process 1 failed, so no process has loaded anything: RuntimeError: no"
    assert first["missing"].startswith("CheckpointError: process 1 failed")
    assert first["nan"].startswith("CheckpointError: process 1 failed")
    assert second["nan"].startswith("CheckpointError: 1 weights hold NaN or Inf")


def test_an_error_before_the_first_step_or_after_the_last_is_told_and_undone(of_two):
    first, second = (each["fail in one"] for each in of_two)
    assert second[0].startswith("UnsupportedError: the model is quantized already")
    assert first[0].startswith("UnsupportedError: process 1 failed, so no process has loaded anything: the model is")
    assert second[1] == "RuntimeError: no state"
    assert first[1] == "BigqError: process 1 failed, so no process has loaded anything: RuntimeError: no state"
    for said in (first, second):
        assert "are sharded (DTensor)" in said[2]
        assert said[3:] == [True, True]  # the sharded model runs as before, and the new one is on meta


@pytest.mark.parametrize(
    "place",
    ["memory for the gathers", "the third gather", "the second weight", "the last weight", "the tenth tensor"],
)
def test_an_error_while_scales_are_gathered_is_told_and_undone(of_two, place):
    first, second = (each["while gathering"][place] for each in of_two)
    assert second == ("OutOfMemoryError: no memory", True)
    words = "BigqError: process 1 failed, so no process has loaded anything: OutOfMemoryError: no memory"
    assert first == (words, True)


def test_a_model_is_loaded_after_loads_that_failed(of_two):
    assert [each["while gathering"]["then"] for each in of_two] == [True, True]
    assert [each["refused"]["then"] for each in of_two] == [True, True]


def _load_onto_cpu(rank, folder):
    """Where shards are that FSDP2 keeps on the CPU, for a mesh of one GPU, what they compute, and what is saved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    torch.cuda.set_device(0)
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    mesh, config = init_device_mesh("cuda", (1,)), QuantizationConfig(NF4(double_quant=True), also_quantize=STACKS)
    whole, found = load_net(folder, config, device_map="cuda:0"), {}
    expected = whole(IDS.cuda())
    for name, arguments in {"pinned": {}, "pageable": {}, "disk": {"offload_folder": f"{folder}/off"}}.items():

        def on_cpu(model, policy=CPUOffloadPolicy(pin_memory=name == "pinned")):  # noqa: B008
            for block in model.blocks:
                fully_shard(block, mesh=mesh, offload_policy=policy)
            return fully_shard(model, mesh=mesh)

        model = load_net(folder, config, mesh=mesh, shard=on_cpu, **arguments)
        in_file = [is_file_backed(p.to_local()) for p in model.blocks.parameters() if not p.requires_grad]
        held = {name: p.to_local() for name, p in model.named_parameters() if hasattr(p, "to_local")}
        outputs = [model(IDS.cuda()) for _ in range(2)]
        bigq.save_quantized(model, f"{folder}/saved-{name}")
        found[name] = {
            "devices": {name.partition(".")[0]: (t.device.type, t.is_pinned()) for name, t in held.items()},
            "outputs": all(torch.equal(out, expected) for out in outputs),
            "in file": sum(in_file) / len(in_file),
            "saved": torch.equal(load_net(f"{folder}/saved-{name}", None, device_map="cuda:0")(IDS.cuda()), expected),
        }
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pinned", "pageable", "disk"])
def test_shards_that_fsdp2_keeps_on_the_cpu_are_made_there(checkpoint, tmp_path, name):
    (found,) = run_ranks(_load_onto_cpu, tmp_path, str(checkpoint), world=1)
    devices = found[name]["devices"]
    assert devices.pop("blocks") == ("cpu", name == "pinned")
    assert set(devices.values()) == {("cuda", False)}
    assert found[name]["in file"] == (name == "disk")
    assert found[name]["outputs"]
    assert found[name]["saved"]
