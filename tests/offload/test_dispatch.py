"""Where hooks sit, and that every placement computes the same bits."""

import gc
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import QuantizationConfig, QuantizedLinear, load_and_quantize_model, materialize, memory_footprint
from bigq.offload.attach import attach
from bigq.offload.dispatch import _units
from bigq.offload.hooks import Float32Hook, PlacementHook
from bigq.offload.space import is_file_backed
from bigq.system.internals import COUNTS_HOLDERS, TELLS_HOOKS

GPU = torch.cuda.is_available()
RUNS_ON = 0 if GPU else "cpu"
CONFIGS = {
    "nf4": QuantizationConfig("nf4"),
    "nf4-dq": QuantizationConfig("nf4", double_quant=True),
    "fp4": QuantizationConfig("fp4"),
    "int8": QuantizationConfig("int8"),
}
MAPS = {
    "disk": {"": RUNS_ON, "blocks.0": "disk", "blocks.1": "disk", "blocks.2": "disk"},
    "all-disk-but-the-root": {"": RUNS_ON, "embed": "disk", "blocks": "disk", "head": "disk"},
    "everything-on-disk": {"": "disk"},
    "mixed": {"": RUNS_ON, "embed": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "head": "cpu"},
    "a-root-parameter": {"": RUNS_ON, "gain": "disk"},
    "leaves": {"": RUNS_ON, "blocks.1.up": "disk", "blocks.2.down": "cpu"},
}


def hooks_of(model):
    return {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS.keys())
def test_every_placement_computes_the_bits_of_the_resident_model(
    tiny, checkpoint, empty, ids, tmp_path, config, device_map
):
    if GPU and set(device_map.values()) <= {"cpu", "disk"}:
        pytest.skip("without a GPU in the map the CPU runs it")
    resident = load_and_quantize_model(empty(tiny), checkpoint, config, RUNS_ON)
    model = load_and_quantize_model(
        empty(tiny), checkpoint, config, device_map, offload="quantized", offload_folder=tmp_path / "offload"
    )
    expected = resident(ids.to(next(resident.parameters()).device)).cpu()
    for _ in range(2):
        assert torch.equal(model(ids), expected)  # inputs on the CPU: the root brings them in and the output back
    for name, tensor in resident.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor.cpu())
    Accelerator().save_model(model, tmp_path / "saved", max_shard_size="30KB")
    again = load_and_quantize_model(empty(tiny), tmp_path / "saved", device_map=RUNS_ON)
    for name, tensor in resident.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_kept_linear_without_bias_computes_the_bits_of_a_frozen_one(empty, tmp_path):
    class Transposing(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.Linear(96, 96), nn.Linear(96, 50, bias=False)

        def forward(self, x):
            return self.head(self.up(x).transpose(1, 2).contiguous().transpose(1, 2))

    save_file(Transposing().state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 5, 96)
    with torch.no_grad():
        frozen = load_and_quantize_model(empty(Transposing), tmp_path, CONFIGS["nf4"], RUNS_ON).requires_grad_(False)
        expected = frozen(x.to(frozen.head.weight.device)).cpu()
        offloaded = load_and_quantize_model(empty(Transposing), tmp_path, CONFIGS["nf4"], {"": RUNS_ON, "head": "disk"})
        assert torch.equal(offloaded(x), expected)
        assert torch.equal(materialize(offloaded)(x.to(frozen.head.weight.device)).cpu(), expected)
    assert not offloaded.head.weight.requires_grad


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_saved_model_loads_onto_the_disk(tiny, checkpoint, empty, ids, tmp_path, config):
    resident = load_and_quantize_model(empty(tiny), checkpoint, config, RUNS_ON)
    Accelerator().save_model(resident, tmp_path / "saved")
    model = load_and_quantize_model(
        empty(tiny), tmp_path / "saved", None, MAPS["mixed"], offload_folder=tmp_path / "offload"
    )
    assert is_file_backed(model.blocks[1].up.weight_packed)
    assert isinstance(model.blocks[0].up, QuantizedLinear)
    assert torch.equal(model(ids), resident(ids.to(next(resident.parameters()).device)).cpu())


class TestPolicy:
    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    def test_a_custom_map_preserves_for_4_bit(self, tiny, checkpoint, empty, tmp_path, name):
        save_file(
            {
                k: t.bfloat16() if t.is_floating_point() else t
                for k, t in load_file(checkpoint / "model.safetensors").items()
            },
            tmp_path / "h.safetensors",
        )
        model = load_and_quantize_model(
            empty(tiny),
            tmp_path / "h.safetensors",
            CONFIGS[name],
            {"": RUNS_ON, "blocks.1": "disk"},
            offload_folder=tmp_path,
            strict=False,
        )
        assert type(model.blocks[1].up) is nn.Linear
        assert model.blocks[1].up.weight.dtype == torch.bfloat16
        assert is_file_backed(model.blocks[1].up.weight)
        assert isinstance(model.blocks[0].up, QuantizedLinear)

    def test_a_custom_map_quantizes_for_int8(self, tiny, checkpoint, empty, tmp_path):
        model = load_and_quantize_model(
            empty(tiny), checkpoint, CONFIGS["int8"], {"": RUNS_ON, "blocks.1": "disk"}, offload_folder=tmp_path
        )
        assert isinstance(model.blocks[1].up, QuantizedLinear)

    @pytest.mark.parametrize("where", ["config", "argument"])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_float32_on_request(self, tiny, checkpoint, empty, ids, tmp_path, name, where):
        options = {"dtype": torch.bfloat16, "cast_buffers": True}
        fmt = CONFIGS[name].format
        offload = {"offload": torch.float32}
        config = QuantizationConfig(fmt, **options, **(offload if where == "config" else {}))
        model = load_and_quantize_model(
            empty(tiny),
            checkpoint,
            config,
            {"": RUNS_ON, "blocks.1": "disk"},
            offload_folder=tmp_path,
            **(offload if where == "argument" else {}),
        )
        assert {p.dtype for p in model.blocks[1].parameters()} == {torch.float32}
        assert model.blocks[0].norm.weight.dtype == model.head.weight.dtype == torch.bfloat16
        model.mask = model.mask.bfloat16()
        out = model(ids)
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()

    def test_an_automatic_map_that_spills_stays_packed(self, tiny, checkpoint, empty, ids, tmp_path):
        resident = load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["nf4"], "cpu")
        budget = memory_footprint(resident).total_nbytes // 2
        model = load_and_quantize_model(
            empty(tiny), checkpoint, CONFIGS["nf4"], "auto", max_memory={"cpu": budget}, offload_folder=tmp_path
        )
        found = memory_footprint(model).nbytes
        assert sum(found["cpu"].values()) <= budget
        assert found["disk"]["packed"] > 0
        assert torch.equal(model(ids), resident(ids))

    def test_an_automatic_map_preserves_on_request(self, tiny, checkpoint, empty, ids, tmp_path):
        model = load_and_quantize_model(
            empty(tiny),
            checkpoint,
            CONFIGS["nf4"],
            "auto",
            max_memory={"cpu": 60_000},
            offload_folder=tmp_path,
            offload="preserve",
        )
        on_disk = [
            m for m in model.modules() if isinstance(m, nn.Linear) and any(is_file_backed(p) for p in m.parameters())
        ]
        assert on_disk
        assert all(type(m) is nn.Linear for m in on_disk)
        assert model(ids).isfinite().all()

    def test_what_is_preserved_is_cast_once_at_load(self, tiny, checkpoint, empty, ids, tmp_path):
        config = QuantizationConfig("nf4", dtype="bf16")
        device_map = {"": RUNS_ON, "blocks.1": "disk"}
        model = load_and_quantize_model(empty(tiny), checkpoint, config, device_map, offload_folder=tmp_path)
        at_rest = {name: (t.dtype, t.data_ptr()) for name, t in model.blocks[1].state_dict().items()}
        assert {dtype for dtype, _ in at_rest.values()} == {torch.bfloat16}
        model.mask, model.offset = model.mask.bfloat16(), model.offset.bfloat16()
        model(ids)
        assert {name: (t.dtype, t.data_ptr()) for name, t in model.blocks[1].state_dict().items()} == at_rest


class TestHooks:
    def test_a_model_in_one_place_has_none(self, tiny, checkpoint, empty):
        assert not hooks_of(load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["nf4"], RUNS_ON))

    def test_they_sit_on_offloaded_blocks_and_the_root(self, tiny, checkpoint, empty, tmp_path):
        model = load_and_quantize_model(
            empty(tiny),
            checkpoint,
            CONFIGS["int8"],
            {"": RUNS_ON, "blocks.1": "disk"},
            offload_folder=tmp_path,
            skip_keys="cache",
        )
        assert list(hooks_of(model)) == ["", "blocks.1"]
        assert all(isinstance(hook, PlacementHook) and hook.skip_keys == "cache" for hook in hooks_of(model).values())

    def test_gradients_go_to_what_is_resident(self, tiny, checkpoint, empty, ids, tmp_path):
        device_map = {"": RUNS_ON, "blocks.1": "disk"}
        model = load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["nf4"], device_map, offload_folder=tmp_path)
        model(ids).sum().backward()
        assert not any(p.requires_grad for p in model.blocks[1].parameters())
        assert model.blocks[0].norm.weight.grad is not None

    def test_units_are_blocks_and_callers(self, tiny):
        units = _units(tiny(), {"": "cpu"})
        assert [unit.path for unit in units] == ["", "embed", "blocks.0", "blocks.1", "blocks.2", "head"]
        root = units[0]
        assert [leaf for _, leaf, _, _ in root.tensors] == ["gain", "offset", "steps", "mask"]
        assert len(units[2].tensors) == 5
        split = _units(tiny(), {"": "cpu", "blocks.1.up": "disk"})
        assert [unit.path for unit in split][3:6] == ["blocks.1.norm", "blocks.1.up", "blocks.1.down"]

    def test_a_parameter_list_belongs_to_its_caller(self):
        class Owner(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Module()
                self.inner.parts = nn.ParameterList([torch.ones(2)])
                self.inner.forward = None

            def forward(self):
                return self.inner.parts[0]

        assert [unit.path for unit in _units(nn.ModuleDict({"a": Owner()}), {"": "cpu"})] == ["a"]

    def test_float32_modules_are_callable_and_the_head_keeps_its_precision(self, tiny, checkpoint, empty, ids):
        config = QuantizationConfig("nf4", dtype="bf16", cast_buffers=True, keep_in_fp32_modules=["norm", "head"])
        model = load_and_quantize_model(empty(tiny), checkpoint, config, RUNS_ON)
        model.mask = model.mask.bfloat16()
        assert model.head.weight.dtype == model.blocks[0].norm.bias.dtype == torch.float32
        assert [type(hook) for hook in hooks_of(model).values()] == [Float32Hook] * 4
        assert model(ids.to(model.head.weight.device)).dtype == torch.float32
        seen = []
        model.blocks[0].up.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        model(ids.to(model.head.weight.device))
        assert seen == [torch.bfloat16]

    def test_a_module_with_quantized_weights_does_not_become_float32(self):
        """All floating parameters of the inner module are float32 by the rule, but its quantized linear is not."""
        inner = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
        model = nn.Sequential(inner, nn.LayerNorm(64), nn.Linear(64, 8))
        config = QuantizationConfig("nf4", dtype="bf16", keep_in_fp32_modules=["0.1"])
        load_and_quantize_model(model, None, config, "cpu")
        assert isinstance(inner[0], QuantizedLinear)
        assert list(hooks_of(model)) == ["0.1"]

    def test_no_casting_hooks_in_a_float32_model(self, tiny, checkpoint, empty):
        config = QuantizationConfig("nf4", keep_in_fp32_modules=["norm"])
        assert not hooks_of(load_and_quantize_model(empty(tiny), checkpoint, config, RUNS_ON))

    def test_removing_them_leaves_real_tensors(self, tiny, checkpoint, empty, ids, tmp_path):
        model = load_and_quantize_model(
            empty(tiny), checkpoint, CONFIGS["nf4"], {"": "cpu", "blocks.1": "disk"}, offload_folder=tmp_path
        )
        expected = model(ids)
        remove_hook_from_submodules(model)
        assert not hooks_of(model)
        assert torch.equal(model(ids), expected)
        assert not any(t.is_meta for t in model.state_dict().values())

    @pytest.mark.parametrize(
        "device_map",
        [{"": RUNS_ON, "blocks": "disk"}, {"": RUNS_ON, "blocks.0": "disk", "blocks.2": "disk"}, "auto"],
        ids=str,
    )
    def test_a_block_under_two_names_has_one_hook(self, tiny, empty, ids, tmp_path, device_map):
        class Shared(tiny):
            def __init__(self):
                super().__init__()
                self.blocks[2] = self.blocks[0]

        save_file({k: t.clone() for k, t in Shared().state_dict().items()}, tmp_path / "model.safetensors")
        resident = load_and_quantize_model(empty(Shared), tmp_path, CONFIGS["nf4"], "cpu")
        model = load_and_quantize_model(
            empty(Shared),
            tmp_path,
            CONFIGS["nf4"],
            device_map,
            offload="quantized",
            offload_folder=tmp_path,
            max_memory={"cpu": 34_000},
        )
        assert is_file_backed(model.blocks[0].up.weight_packed)
        if not GPU:
            assert torch.equal(model(ids), resident(ids))
            assert torch.equal(model(ids), resident(ids))
        assert model.blocks[2] is model.blocks[0]
        assert isinstance(model.blocks[0]._hf_hook, PlacementHook)
        assert is_file_backed(model.blocks[0].up.weight_packed)

    def test_skip_keys_stay_where_they_are(self):
        class Given(nn.Module):
            def forward(self, **kwargs):
                return kwargs

        module = Given()
        attach(module, PlacementHook(torch.device("meta"), skip_keys="cache"))
        x = torch.ones(2)
        kwargs = module(hidden=x, cache=x)
        assert kwargs["hidden"].is_meta
        assert kwargs["cache"] is x


def test_nothing_grows_from_pass_to_pass(tiny, checkpoint, empty, ids, tmp_path):
    model = load_and_quantize_model(
        empty(tiny), checkpoint, CONFIGS["nf4"], MAPS["disk"], offload="quantized", offload_folder=tmp_path
    )
    (prefetcher,) = {block._hf_hook.prefetcher for block in model.blocks}

    def tensors_alive():
        for slot in prefetcher._slots:
            slot.wait_for_reads()  # made ahead for the next pass: a thread holds a part of the slot until then
        gc.collect()
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    levels = []
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):  # three blocks meet two slots in six ways
                model(ids)
            levels.append(tensors_alive())
            for _ in range(5):
                model(ids)
            assert tensors_alive() <= levels[-1]
    if TELLS_HOOKS:  # otherwise a graph takes slots along, and fewer are kept
        assert max(levels) == levels[0]


def test_packed_weights_are_in_memory_in_two_slots_and_no_more(tiny, checkpoint, empty, ids, tmp_path):
    gc.collect()  # models of tests before hold such tensors too
    model = load_and_quantize_model(
        empty(tiny), checkpoint, CONFIGS["int8"], {"": "cpu", "blocks": "disk"}, offload_folder=tmp_path
    )
    for _ in range(3):
        model(ids)
    memories = {
        value.untyped_storage().data_ptr()
        for value in gc.get_objects()
        if issubclass(type(value), torch.Tensor) and value.dtype == torch.int8 and value.shape == (216, 72)
    }
    at_rest = {block.up.weight_packed.untyped_storage().data_ptr() for block in model.blocks}
    kept = 2 if COUNTS_HOLDERS and TELLS_HOOKS else 0  # otherwise each call of a graph has tensors of its own
    assert len(memories - at_rest) == kept, "two slots for three blocks"


def _peak_above_rest(model, ids):
    """Bytes that a forward takes above what is allocated before it; nothing of them stays."""
    gc.collect()  # models of tests before, which are cycles once they have hooks, would go at any time
    with torch.no_grad():
        model(ids)
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert model(ids).device == ids.device
    assert torch.cuda.memory_allocated() == rest
    return torch.cuda.max_memory_allocated() - rest


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("place", ["cpu", "disk"])
    @pytest.mark.parametrize("offload", ["quantized", "preserve"])
    def test_offloaded_blocks_leave_the_gpu(self, tiny, empty, tmp_path, place, offload):
        save_file(tiny(width=1024, blocks=6).state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(
            empty(tiny, width=1024, blocks=6),
            tmp_path / "model.safetensors",
            CONFIGS["nf4"],
            {"": 0, "blocks": place},
            offload=offload,
            offload_folder=tmp_path / "offload",
        )
        ids = torch.arange(8, device="cuda")[None]
        # torch's allocator rounds each tensor up to 512 bytes
        block = sum(-(-t.numel() * t.element_size() // 512) * 512 for t in model.blocks[0].state_dict().values())
        all_on_gpu = load_and_quantize_model(
            empty(tiny, width=1024, blocks=6), tmp_path / "model.safetensors", CONFIGS["nf4"], 0
        )
        workspace = _peak_above_rest(all_on_gpu, ids)
        del all_on_gpu
        for _ in range(3):
            assert _peak_above_rest(model, ids) <= workspace + block + (1 << 20)
        assert {t.device.type for t in model.blocks.state_dict().values()} == {"cpu"}
        assert {is_file_backed(t) for t in model.blocks.state_dict().values()} == {place == "disk"}
        assert {t.is_pinned() for t in model.blocks.state_dict().values()} == {place == "cpu"}

    def test_inputs_and_outputs_keep_their_device(self, tiny, checkpoint, empty, ids):
        model = load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["nf4"], {"": 0, "blocks.1": "cpu"})
        assert model(ids).device.type == "cpu"
        assert model(ids.cuda()).device.type == "cuda"
        assert torch.equal(model(ids), model(ids.cuda()).cpu())

    def test_modules_for_the_cpu_are_quantized_as_on_the_gpu(self, tiny, checkpoint, empty):
        on_gpu = load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["nf4-dq"], 0)
        on_cpu = load_and_quantize_model(
            empty(tiny), checkpoint, CONFIGS["nf4-dq"], {"": 0, "blocks": "cpu"}, offload="quantized"
        )
        for name, tensor in on_gpu.state_dict().items():
            assert torch.equal(tensor.cpu(), on_cpu.state_dict()[name].cpu()), name

    def test_a_single_device_map_needs_no_hooks(self, tiny, checkpoint, empty, ids):
        model = load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["int8"])
        assert not hasattr(model, "hf_device_map")
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        assert model(ids.cuda()).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tiny, checkpoint, empty, ids):
    one = load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["nf4"], 0)
    two = load_and_quantize_model(
        empty(tiny),
        checkpoint,
        CONFIGS["nf4"],
        {"": 0, "blocks.1": 1, "blocks.2": "cpu", "head": 1},
        offload="quantized",
    )
    assert two.blocks[1].up.weight.device.index == 1
    assert torch.equal(two(ids), one(ids.cuda()).cpu())


def test_paths_are_accepted_as_offload_folder(tiny, checkpoint, empty, ids, tmp_path: Path):
    for folder in (str(tmp_path / "a"), tmp_path / "b"):
        model = load_and_quantize_model(
            empty(tiny), checkpoint, CONFIGS["int8"], {"": "cpu", "head": "disk"}, offload_folder=folder
        )
        assert model(ids).isfinite().all()
