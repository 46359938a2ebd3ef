"""What accelerate + bitsandbytes get wrong or refuse, one test a point, named after it."""

import gc
import json
import time
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import BnbQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import (
    CheckpointError,
    ConfigError,
    QuantizationConfig,
    QuantizedLinear,
    infer_device_map,
    load_and_quantize_model,
    memory_footprint,
)
from bigq.formats import Block4, Rows
from bigq.model.selection import select_weights
from bigq.model.tree import ModelTree
from bigq.offload.hooks import PlacementHook
from bigq.offload.space import is_file_backed

NF4 = QuantizationConfig("nf4")


@pytest.fixture
def load(tiny, checkpoint, empty, tmp_path):
    """load(config, device_map, ...): the checkpoint in a new skeleton."""

    def load(config=NF4, device_map="cpu", weights=checkpoint, **options):
        return load_and_quantize_model(
            empty(tiny), weights, config, device_map, offload_folder=tmp_path / "offload", **options
        )

    return load


def quantized_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def test_argument_order(tiny, empty, checkpoint, ids):
    ours = load_and_quantize_model(empty(tiny), checkpoint, NF4, "cpu")
    theirs = load_and_quantize_model(empty(tiny), NF4, checkpoint, "cpu")
    named = load_and_quantize_model(
        empty(tiny), weights_location=checkpoint, bnb_quantization_config=NF4, device_map={"": "cpu"}
    )
    assert torch.equal(ours(ids), theirs(ids))
    assert torch.equal(ours(ids), named(ids))


class TestWeightsLocation:
    @pytest.fixture
    def state(self, checkpoint):
        return load_file(checkpoint / "model.safetensors")

    @pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
    @pytest.mark.parametrize("name", ["odd name.safetensors", "weights.bin", "weights.pt"])
    def test_a_file(self, load, state, tmp_path, name, as_path, ids):
        path = tmp_path / name
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        assert torch.equal(load(weights=as_path(path))(ids), load()(ids))

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    @pytest.mark.parametrize("point_at", ["folder", "index"])
    def test_shards(self, load, state, tmp_path, kind, point_at, ids):
        folder = tmp_path / "shards"
        folder.mkdir()
        stem = "model" if kind == "safetensors" else "pytorch_model"
        names, weight_map = list(state), {}
        for number, part in enumerate((names[::2], names[1::2])):
            file = f"{stem}-0000{number + 1}-of-00002.{kind}"
            shard = {name: state[name].clone() for name in part}
            save_file(shard, folder / file) if kind == "safetensors" else torch.save(shard, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = folder / f"{stem}.{kind}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert torch.equal(load(weights=folder if point_at == "folder" else index)(ids), load()(ids))

    def test_safetensors_win_over_pickles(self, load, state, checkpoint, ids):
        expected = load()(ids)
        torch.save({name: torch.zeros_like(tensor) for name, tensor in state.items()}, checkpoint / "pytorch_model.bin")
        assert torch.equal(load(weights=checkpoint)(ids), expected)

    def test_of_two_indexes_the_complete_one(self, load, state, checkpoint, tmp_path, ids):
        folder = tmp_path / "two"
        folder.mkdir()
        save_file(state, folder / "model-00001-of-00001.safetensors")
        for stem, file in (
            ("model.safetensors", "model-00001-of-00001.safetensors"),
            ("pytorch_model.bin", "gone.bin"),
        ):
            (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, file)}))
        assert torch.equal(load(weights=folder)(ids), load()(ids))


def test_hub_id(load, checkpoint, monkeypatch, ids):
    from bigq.checkpoint import hub

    asked = []

    class Api:
        def __init__(self, *args, **kwargs):
            pass

        def model_info(self, repo_id, revision=None, **kwargs):
            siblings = ["README.md", "model.safetensors", "pytorch_model.bin", "tf_model.h5"]
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in siblings]})

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, **kwargs):
        asked.append((repo_id, revision, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert torch.equal(load(weights="someone/tiny@v1")(ids), load()(ids))
    assert asked == [("someone/tiny", "v1", ["model.safetensors"])]


def test_config_is_not_mutated_and_does_not_leak_between_models(tiny, empty, checkpoint):
    config = BnbQuantizationConfig(load_in_4bit=True, keep_in_fp32_modules=["norm"])
    before = dict(vars(config))

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.other_head = nn.Linear(8, 8), nn.Linear(8, 2)
            self.norm = nn.LayerNorm(8)

    for model in (load_and_quantize_model(tiny(), config), load_and_quantize_model(Other(), config)):
        assert quantized_names(model)
    assert vars(config) == before
    assert before["keep_in_fp32_modules"] == ["norm"]
    assert quantized_names(load_and_quantize_model(Other(), config)) == {"body"}


class TestDefaultSkip:
    def test_a_one_child_wrapper_does_not_hide_the_model(self, tiny, ids):
        wrapper = nn.Sequential(tiny())
        load_and_quantize_model(wrapper, None, NF4, "cpu")
        assert len(quantized_names(wrapper)) == 6
        assert type(wrapper[0].head) is nn.Linear

    def test_the_last_linear_and_not_the_last_child(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.ReLU())
        assert set(select_weights(ModelTree(model), NF4.weight_format()).weights) == {"0.weight"}

    def test_a_weight_in_the_path_is_no_weight(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight_net = nn.Linear(4, 4)
                self.head = nn.Linear(4, 4)

        assert set(select_weights(ModelTree(Odd()), NF4.weight_format()).weights) == {"weight_net.weight"}

    def test_the_users_list_adds_to_it(self, load):
        assert quantized_names(load(QuantizationConfig("nf4", skip_modules=["blocks.0"]))) == {
            f"blocks.{i}.{leaf}" for i in (1, 2) for leaf in ("up", "down")
        }
        every = load(QuantizationConfig("nf4", skip_modules=["blocks.0"], skip_defaults=False))
        assert "head" in quantized_names(every)


class TestSkipSyntax:
    def test_component_borders(self, load):
        assert "blocks.1.up" in quantized_names(load(QuantizationConfig("nf4", skip_modules=["blocks.0"])))
        assert "blocks.1.up" not in quantized_names(load(QuantizationConfig("nf4", skip_modules=["up"])))
        assert "blocks.1.up" not in quantized_names(load(QuantizationConfig("nf4", skip_modules=["blocks.*.up"])))

    def test_a_pattern_that_matches_nothing_is_an_error(self, load):
        with pytest.raises(ConfigError, match=r"skip_modules 'ups' matches no module.*near: .*up"):
            load(QuantizationConfig("nf4", skip_modules=["ups"]))


def test_linear_subclasses_are_not_replaced_and_attention_runs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.up, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.up(self.attention(x, x, x)[0]))

    model = load_and_quantize_model(Model().eval(), None, QuantizationConfig("nf4", dtype="bf16"), "cpu")
    assert quantized_names(model) == {"up"}
    assert model(torch.randn(2, 3, 16).bfloat16()).isfinite().all()


def test_shared_modules_and_ties(tiny, empty, tmp_path, ids):
    class Shared(tiny):
        def __init__(self):
            super().__init__(tied=True)
            self.blocks[1] = self.blocks[0]

    plain = Shared()
    save_file({name: t.clone() for name, t in plain.state_dict().items()}, tmp_path / "model.safetensors")
    model = load_and_quantize_model(empty(Shared), tmp_path, NF4, "cpu")
    assert model.blocks[1].up is model.blocks[0].up
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_keep_in_fp32_under_every_dtype(load, checkpoint, dtype):
    model = load(QuantizationConfig("nf4", dtype=dtype, keep_in_fp32_modules=["blocks.1"]))
    assert {p.dtype for p in model.blocks[1].parameters()} == {torch.float32}
    assert torch.equal(model.blocks[1].up.weight, load_file(checkpoint / "model.safetensors")["blocks.1.up.weight"])
    assert "blocks.1.up" not in quantized_names(model)
    assert "blocks.2.up" in quantized_names(model)


def test_dtype_of_offloaded_is_cast_once_at_load(load, ids):
    model = load(QuantizationConfig("nf4", dtype="bf16"), {"": "cpu", "blocks.1": "disk"})
    at_rest = {name: (t.dtype, t.data_ptr()) for name, t in model.blocks[1].state_dict().items()}
    assert {dtype for dtype, _ in at_rest.values()} == {torch.bfloat16}
    model.mask, model.offset = model.mask.bfloat16(), model.offset.bfloat16()
    model(ids)
    assert {name: (t.dtype, t.data_ptr()) for name, t in model.blocks[1].state_dict().items()} == at_rest


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_buffers_are_loaded_and_keep_their_dtype(empty, tmp_path, place):
    def build():
        return nn.ModuleDict(
            {"body": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "mid": nn.Linear(8, 8), "head": nn.Linear(8, 4)}
        )

    plain = build()
    norm = plain["body"][1]
    norm.running_mean.uniform_(), norm.running_var.uniform_(1, 2), norm.num_batches_tracked.fill_(5)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    model = load_and_quantize_model(
        empty(build),
        tmp_path,
        QuantizationConfig("nf4", dtype="fp16"),
        {"": "cpu", "body": place},
        offload_folder=tmp_path / "offload",
    )
    loaded = model["body"][1]
    for name, buffer in norm.named_buffers():
        assert torch.equal(getattr(loaded, name), buffer)
        assert getattr(loaded, name).dtype == buffer.dtype
        assert not is_file_backed(getattr(loaded, name)), "buffers rest where they run"


@pytest.mark.parametrize("value", ["cpu", torch.device("cpu"), "disk"], ids=str)
def test_device_map_values(load, ids, value):
    assert torch.equal(load(device_map={"": value}, offload="quantized")(ids), load()(ids))


def test_main_device_is_the_first_of_the_map():
    from bigq.planning.device_map import execution_device

    for first, second in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
        assert str(execution_device({"a": "disk", "b": first, "c": second})) == first


def test_auto_map_4bit_spill(load, ids):
    half = memory_footprint(load()).total_nbytes // 2
    model = load(device_map="auto", max_memory={"cpu": half})
    assert memory_footprint(model).nbytes["disk"]["packed"] > 0
    assert torch.equal(model(ids), load()(ids))


def test_sizes_are_exact(tiny, load, empty):
    total = memory_footprint(load()).total_nbytes
    assert infer_device_map(empty(tiny), NF4, max_memory={"cpu": total}) == {"": "cpu"}
    assert infer_device_map(empty(tiny), NF4, max_memory={"cpu": total - 1}, offload_folder="anywhere") != {"": "cpu"}


def test_buffers_of_a_split_module_stay_in_the_map(tiny, empty):
    places = infer_device_map(empty(tiny), NF4, max_memory={"cpu": 40_000}, offload_folder="anywhere")
    assert {"gain", "offset", "steps"} <= set(places)


def test_missing_keys_and_shapes_before_anything_is_read(tiny, empty, tmp_path, monkeypatch):
    from bigq.checkpoint import Checkpoint

    state = {name: t for name, t in tiny().state_dict().items() if name != "blocks.2.up.weight"}
    state["blocks.0.down.weight"] = torch.zeros(72, 100)
    save_file(state, tmp_path / "model.safetensors")
    read = []
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: iter(read.extend(names) or ()))
    with pytest.raises(CheckpointError) as error:
        load_and_quantize_model(empty(tiny), tmp_path, NF4)
    assert "blocks.2.up.weight" in str(error.value)
    assert "blocks.0.down.weight" in str(error.value)
    assert "expected shape [72, 216], found [72, 100]" in str(error.value)
    assert not read


def test_load_lets_go_of_each_full_precision_weight(tiny, empty, tmp_path, monkeypatch):
    save_file(tiny(width=256, blocks=6).state_dict(), tmp_path / "model.safetensors")
    alive, most = [], []
    original = Block4.quantize_rows

    def counting(self, rows, **how):
        most.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(rows))
        return original(self, rows, **how)

    monkeypatch.setattr(Block4, "quantize_rows", counting)
    load_and_quantize_model(empty(tiny, width=256, blocks=6), tmp_path, NF4, "cpu", read_budget=1 << 20)
    assert len(most) == 6 * (3 + 4)  # 768 KiB each, in pieces of whole rows of at most a quarter of the budget
    assert max(most) == 0


def test_work_per_tensor_does_not_grow_with_their_number(empty, tmp_path, monkeypatch):
    """accelerate takes 47 s for 16,000 tensors in a map of as many entries. All but the arithmetic is timed here."""

    class Experts(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))
            self.head = nn.Linear(8, 8)

        def forward(self, x):
            return self.head(self.experts[0](x))

    seconds = {}
    monkeypatch.setattr(
        Block4,
        "quantize_rows",
        lambda self, rows, **how: Rows(
            {"packed": torch.zeros(len(rows), 4), "absmax": torch.ones(len(rows), 1)}, torch.ones(())
        ),
    )
    for count in (500, 4000):
        save_file(Experts(count).state_dict(), tmp_path / "model.safetensors")
        model = empty(Experts, count=count)
        device_map = {"head": "cpu", **{f"experts.{i}": "cpu" for i in range(count)}}
        start = time.process_time()
        load_and_quantize_model(model, tmp_path, NF4, device_map)
        seconds[count] = (time.process_time() - start) / count
    assert seconds[4000] < 2 * seconds[500]


def test_disk_offload_keeps_to_itself(tiny, empty, tmp_path, ids):
    """Two models of the same names in one folder."""
    models, outputs = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(tiny().state_dict(), tmp_path / "model.safetensors")
        models.append(
            load_and_quantize_model(
                empty(tiny), tmp_path, NF4, {"": "cpu", "blocks": "disk"}, offload_folder=tmp_path / "one"
            )
        )
        outputs.append(models[-1](ids))
    assert not torch.equal(*outputs)
    assert torch.equal(models[0](ids), outputs[0])


def test_int8_offload_really_leaves(load, ids):
    model = load(QuantizationConfig("int8"), {"": "cpu", "blocks": "disk"})
    for _ in range(3):
        model(ids)
    memories = {
        value.untyped_storage().data_ptr()
        for value in gc.get_objects()
        if issubclass(type(value), torch.Tensor) and value.dtype == torch.int8 and value.shape == (216, 72)
    }
    at_rest = {model.blocks[i].up.weight_packed.untyped_storage().data_ptr() for i in range(3)}
    assert len(memories - at_rest) == 2, "two slots for three blocks"


def test_exception_in_forward(load, ids):
    model = load(device_map={"": "cpu", "blocks.1": "disk"})
    handle = model.blocks[1].up.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    handle.remove()
    assert is_file_backed(model.blocks[1].up.weight)
    assert torch.equal(model(ids), load(device_map={"": "cpu", "blocks.1": "disk"})(ids))


def test_autograd_keeps_no_onloaded_weight_for_a_gradient(load, ids):
    model = load(device_map={"": "cpu", "blocks.1": "disk"})
    model(ids).sum().backward()
    assert not any(p.requires_grad for p in model.blocks[1].parameters())
    assert model.blocks[0].norm.weight.grad is not None


def test_skip_keys_can_be_passed(load):
    model = load(device_map={"": "cpu", "blocks.1": "disk"}, skip_keys="cache")
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    assert len(hooks) == 2
    assert all(isinstance(hook, PlacementHook) and hook.skip_keys == "cache" for hook in hooks)


def test_hook_cost_of_resident_modules_is_nothing(load):
    assert not any(hasattr(module, "_hf_hook") for module in load().modules())
    model = load(device_map={"": "cpu", "blocks.1": "disk"})
    assert [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")] == ["", "blocks.1"]


class TestSaveModel:
    @pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu", "blocks.1": "disk", "gain": "disk"}], ids=["", "disk"])
    def test_root_parameters_and_every_format_come_back(
        self, load, tiny, empty, tmp_path, ids, name, device_map, caplog
    ):
        model = load(QuantizationConfig(name), device_map, offload="quantized")
        Accelerator().save_model(model, tmp_path / "saved", max_shard_size="20KB")
        assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
        caplog.clear()
        again = load_and_quantize_model(empty(tiny), tmp_path / "saved", device_map="cpu")
        assert not caplog.records
        assert torch.equal(again.gain, model.gain)
        assert torch.equal(again(ids), model(ids))

    def test_a_second_round_writes_the_same_bytes(self, load, tiny, empty, tmp_path):
        Accelerator().save_model(load(), tmp_path / "one")
        Accelerator().save_model(load_and_quantize_model(empty(tiny), tmp_path / "one"), tmp_path / "two")
        one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
        assert one == two


class TestLoadedModel:
    def test_device_map_is_honoured(self, tiny, tmp_path, ids):
        model = load_and_quantize_model(
            tiny(), None, QuantizationConfig("int8"), {"": "cpu", "blocks.1": "disk"}, offload_folder=tmp_path
        )
        assert is_file_backed(model.blocks[1].up.weight_packed)
        assert model(ids).isfinite().all()

    def test_it_is_not_copied(self, tiny, monkeypatch):
        model = tiny()
        weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
        references = [weakref.ref(weight) for weight in weights[:-1]]
        del weights
        seen = []
        original = Block4.quantize_rows

        def counting(self, rows, **how):
            gc.collect()
            seen.append(sum(reference() is not None for reference in references))
            return original(self, rows, **how)

        monkeypatch.setattr(Block4, "quantize_rows", counting)
        load_and_quantize_model(model, None, NF4, "cpu")
        assert seen == [6, 5, 4, 3, 2, 1], "each old weight is gone before the next is quantized"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    "device_map",
    [
        None,
        "auto",
        {"": "cpu"},
        {"embed": "cpu", "blocks": "cpu", "head": "cpu", "gain": "cpu", "offset": "cpu", "steps": "cpu"},
    ],
)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_no_gpu(load, ids, name, device_map):
    model = load(QuantizationConfig(name), device_map)
    assert len(quantized_names(model)) == 6
    assert torch.equal(model(ids), load(QuantizationConfig(name))(ids))


def test_int8_reload_onto_the_cpu(load, tiny, empty, tmp_path, ids):
    model = load(QuantizationConfig("int8"))
    Accelerator().save_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(tiny), tmp_path / "saved", QuantizationConfig("int8"), {"": "cpu"})
    assert torch.equal(again(ids), model(ids))
