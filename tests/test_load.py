"""load_and_quantize_model: what arrives in which model, under which arguments."""

import sys
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import BnbQuantizationConfig
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import (
    ConfigError,
    QuantizationConfig,
    QuantizedLinear,
    load_and_quantize_model,
)
from bigq.loading.batch_quantizer import BatchQuantizer
from bigq.offload.space import is_file_backed
from dequantized import dequantized


class TestArrival:
    def test_the_weights_are_the_checkpoints(self, tiny, checkpoint, empty, ids, config):
        model = empty(tiny)
        assert load_and_quantize_model(model, checkpoint, config) is model
        original = load_file(checkpoint / "model.safetensors")
        for name, tensor in model.state_dict().items():
            if name in original and not isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear):
                assert torch.equal(tensor.cpu(), original[name]), name
        for index in range(3):
            for leaf in ("up", "down"):
                layer = model.get_submodule(f"blocks.{index}.{leaf}")
                expected = layer.quantize(original[f"blocks.{index}.{leaf}.weight"].to(layer.weight_packed.device))
                assert all(torch.equal(getattr(layer, key), value) for key, value in expected.items())
        assert type(model.head) is nn.Linear

    def test_the_output_is_that_of_the_dequantized_model(self, tiny, checkpoint, empty, ids, config):
        model = load_and_quantize_model(empty(tiny), checkpoint, config)
        plain = tiny()
        plain.load_state_dict(load_file(checkpoint / "model.safetensors"))
        device = next(model.parameters()).device
        expected = dequantized(model, plain)(ids)
        error = (model(ids.to(device)).cpu() - expected).norm() / expected.norm()
        assert error < (5e-3 if config.weight_format().name == "int8" else 1e-5)

    def test_save_and_load_bit_for_bit(self, tiny, checkpoint, empty, ids, config, tmp_path, caplog):
        model = load_and_quantize_model(empty(tiny), checkpoint, config)
        Accelerator().save_model(model, tmp_path / "one")
        Accelerator().save_model(model, tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        caplog.clear()
        x = ids.to(next(model.parameters()).device)
        for folder, again_config in (("one", None), ("one", config), ("shards", None)):
            again = load_and_quantize_model(empty(tiny), tmp_path / folder, again_config)
            assert again.state_dict().keys() == model.state_dict().keys()
            for name, tensor in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], tensor), name
                assert again.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(again(x), model(x))
        assert not caplog.records

    def test_a_model_that_was_loaded_is_saved_as_the_same_bytes(self, tiny, checkpoint, empty, tmp_path):
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
        Accelerator().save_model(model, tmp_path / "one")
        Accelerator().save_model(load_and_quantize_model(empty(tiny), tmp_path / "one"), tmp_path / "two")
        one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
        assert one == two

    def test_in_place_equals_from_a_checkpoint(self, tiny, checkpoint, empty, ids, config):
        loaded = tiny()
        loaded.load_state_dict(load_file(checkpoint / "model.safetensors"))
        embedding = loaded.embed.weight
        in_place = load_and_quantize_model(loaded, quantization_config=config, device_map="cpu")
        streamed = load_and_quantize_model(empty(tiny), checkpoint, config, "cpu")
        assert in_place is loaded
        assert loaded.embed.weight is embedding, "what does not change stays the same object"
        assert torch.equal(in_place(ids), streamed(ids))
        for name, tensor in streamed.state_dict().items():
            assert torch.equal(in_place.state_dict()[name], tensor)

    def test_in_place_takes_a_device_map(self, tiny, checkpoint, ids, tmp_path):
        models = []
        for device_map in ("cpu", {"": "cpu", "blocks.1": "disk"}):
            model = tiny()
            model.load_state_dict(load_file(checkpoint / "model.safetensors"))
            options = {"offload_folder": tmp_path}
            models.append(load_and_quantize_model(model, None, QuantizationConfig("int8"), device_map, **options))
        assert is_file_backed(models[1].blocks[1].up.weight_packed)
        assert torch.equal(models[1](ids), models[0](ids))

    def test_in_place_frees_each_weight_before_the_next_is_quantized(self, tiny, monkeypatch):
        model, alive = tiny(), []
        weights = [weakref.ref(module.weight) for module in model.modules() if type(module) is nn.Linear]
        quantize = BatchQuantizer.quantize

        def counting(self, items):
            alive.append(sum(weight() is not None for weight in weights))
            return quantize(self, items)

        monkeypatch.setattr(BatchQuantizer, "quantize", counting)
        load_and_quantize_model(model, None, QuantizationConfig("nf4"), "cpu")
        assert alive == [7, 6, 5, 4, 3, 2]


class TestArguments:
    def test_both_orders_and_both_names(self, tiny, checkpoint, empty, ids):
        config = QuantizationConfig("nf4")
        models = [
            load_and_quantize_model(empty(tiny), checkpoint, config, "cpu"),
            load_and_quantize_model(empty(tiny), config, checkpoint, "cpu"),
            load_and_quantize_model(empty(tiny), str(checkpoint), config, {"": "cpu"}),
            load_and_quantize_model(
                empty(tiny), weights_location=checkpoint, bnb_quantization_config=config, device_map="cpu"
            ),
        ]
        expected = models[0](ids)
        assert all(torch.equal(model(ids), expected) for model in models)

    def test_accelerates_call_as_it_stands(self, tiny, checkpoint, empty, ids):
        config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="fp32")
        model = load_and_quantize_model(
            empty(tiny), weights_location=str(checkpoint), bnb_quantization_config=config, device_map="auto"
        )
        assert isinstance(model.blocks[0].up, QuantizedLinear)
        assert config.skip_modules is None
        assert config.keep_in_fp32_modules is None
        in_place = load_and_quantize_model(tiny(), config)
        assert isinstance(in_place.blocks[0].up, QuantizedLinear)

    def test_a_config_stays_as_it_is_and_serves_other_models(self, tiny):
        config = BnbQuantizationConfig(load_in_4bit=True, keep_in_fp32_modules=["norm"])
        before = dict(vars(config))
        load_and_quantize_model(tiny(), config)
        other = nn.ModuleDict({"body": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "other_head": nn.Linear(8, 2)})
        load_and_quantize_model(other, config)
        assert [name for name, module in other.named_modules() if isinstance(module, QuantizedLinear)] == ["body"]
        assert vars(config) == before
        assert before["keep_in_fp32_modules"] == ["norm"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
    def test_device_maps_of_a_machine_without_a_gpu(self, tiny, checkpoint, empty, ids):
        config = QuantizationConfig("nf4")
        expected = load_and_quantize_model(empty(tiny), checkpoint, config, "cpu")(ids)
        every = dict.fromkeys(("embed", "blocks", "head", "gain", "offset", "steps"), "cpu")
        for device_map in (None, "auto", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}, every):
            model = load_and_quantize_model(empty(tiny), checkpoint, config, device_map)
            assert torch.equal(model(ids), expected), device_map
            assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 6, device_map

    def test_two_configs_are_refused(self, tiny, checkpoint, empty):
        config = QuantizationConfig("nf4")
        with pytest.raises(ConfigError, match="pass one"):
            load_and_quantize_model(empty(tiny), checkpoint, config, bnb_quantization_config=config)

    def test_marks_for_other_libraries(self, tiny, checkpoint, empty):
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu")
        assert model.quantization_method == "bigq"
        assert model.is_loaded_in_8bit is True
        assert not hasattr(model, "is_loaded_in_4bit")
        assert not hasattr(model, "hf_device_map"), "nothing is offloaded, and there is one device"

    def test_progress_is_silent_where_there_is_no_terminal(self, tiny, checkpoint, empty, capsys):
        load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
        assert capsys.readouterr() == ("", "")

    def test_progress_counts_bytes(self, tiny, checkpoint, empty, capsys):
        load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), progress=True)
        assert "Loading weights: 100%" in capsys.readouterr().err

    def test_progress_honours_the_hubs_switch(self, tiny, checkpoint, empty, capsys):
        disable_progress_bars()  # what HF_HUB_DISABLE_PROGRESS_BARS=1 does
        try:
            load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), progress=True)
        finally:
            enable_progress_bars()
        assert capsys.readouterr().err == ""


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_dtype_casts_parameters_and_leaves_buffers(self, tiny, checkpoint, empty, ids, dtype):
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4", dtype=dtype), "cpu")
        original = load_file(checkpoint / "model.safetensors")
        assert torch.equal(model.embed.weight, original["embed.weight"].to(dtype))
        assert model.blocks[0].up.bias.dtype == dtype
        assert (model.offset.dtype, model.steps.dtype) == (torch.float32, torch.int64)
        assert model.blocks[0].up.absmax.dtype == torch.float32
        cast = QuantizationConfig("nf4", dtype=dtype, cast_buffers=True)
        assert load_and_quantize_model(empty(tiny), checkpoint, cast, "cpu").offset.dtype == dtype

    def test_what_is_kept_in_float32_is_the_checkpoints_under_every_dtype(self, tiny, checkpoint, empty):
        original = load_file(checkpoint / "model.safetensors")
        for dtype in ("fp16", "bf16", "fp32"):
            config = QuantizationConfig("nf4", dtype=dtype, keep_in_fp32_modules=["blocks.1"])
            model = load_and_quantize_model(empty(tiny), checkpoint, config, "cpu")
            for name, parameter in model.blocks[1].named_parameters():
                assert parameter.dtype == torch.float32, (dtype, name)
                assert torch.equal(parameter, original[f"blocks.1.{name}"]), (dtype, name)
            assert isinstance(model.blocks[2].up, QuantizedLinear)

    def test_statistics_are_those_of_the_checkpoint_in_the_dtype_of_parameters(self, empty, tmp_path):
        def build():
            body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
            return nn.ModuleDict({"body": body, "mid": nn.Linear(8, 8), "head": nn.Linear(8, 4)})

        plain = build()
        norm = plain["body"][1]
        norm.running_mean.uniform_(), norm.running_var.uniform_(1, 2), norm.num_batches_tracked.fill_(5)
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        config = QuantizationConfig("nf4", dtype="fp16")
        for place in ("cpu", "disk"):
            device_map = {"": "cpu", "body": place}
            model = load_and_quantize_model(empty(build), tmp_path, config, device_map, offload_folder=tmp_path)
            for name, buffer in norm.named_buffers():
                loaded = getattr(model["body"][1], name)
                dtype = torch.float16 if buffer.is_floating_point() else buffer.dtype
                assert torch.equal(loaded, buffer.to(dtype)), (place, name)
                assert loaded.dtype == dtype, (place, name)
                assert not is_file_backed(loaded), (place, name)  # buffers rest where they run

    def test_the_weight_is_quantized_before_it_is_cast(self, tiny, checkpoint, empty):
        plain = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu")
        half = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4", dtype="fp16"), "cpu")
        assert torch.equal(plain.blocks[0].up.absmax, half.blocks[0].up.absmax)

    def test_the_checkpoints_dtype_is_kept_by_default(self, tiny, empty, tmp_path):
        save_file(tiny().bfloat16().state_dict(), tmp_path / "half.safetensors")
        model = load_and_quantize_model(empty(tiny), tmp_path / "half.safetensors", QuantizationConfig("nf4"), "cpu")
        assert model.embed.weight.dtype == model.head.weight.dtype == torch.bfloat16
        assert model.blocks[0].up.dequantize().dtype == torch.bfloat16

    def test_float64_loads(self, tiny, empty, tmp_path, ids):
        save_file(tiny().double().state_dict(), tmp_path / "model.safetensors")
        config = QuantizationConfig("nf4", dtype="fp32", cast_buffers=True)
        model = load_and_quantize_model(empty(tiny), tmp_path, config, "cpu")
        assert model(ids).dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/fd")
def test_no_file_stays_open(tiny, checkpoint, empty, tmp_path):
    import os

    before = len(os.listdir("/proc/self/fd"))
    model = load_and_quantize_model(
        empty(tiny),
        checkpoint,
        QuantizationConfig("nf4"),
        {"": "cpu", "blocks.0": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # of the offload file: its map's, and one that is read by
    del model
