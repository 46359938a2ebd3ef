"""load_and_quantize_model: what arrives, what is refused, and that a refused call changes nothing."""

import json
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import BnbQuantizationConfig
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import (
    BigqError,
    CheckpointError,
    ConfigError,
    PlacementError,
    QuantizationConfig,
    QuantizedLinear,
    UnsupportedError,
    load_and_quantize_model,
)

CONFIGS = [
    QuantizationConfig("nf4"),
    QuantizationConfig("nf4", double_quant=True, block_size=32),
    QuantizationConfig("fp4"),
    QuantizationConfig("int8"),
]


def name_of(config):
    return f"{config.format}{'-dq' if config.double_quant else ''}"


def dequantized(model, source):
    """`source` with the weights that `model`'s quantized layers stand for, and nothing else of bigq."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            source.get_submodule(name).weight.data = module.dequantize(torch.float32).cpu()
    return source


def snapshot(model):
    """Everything a refused call could have changed: which objects the model holds, and their bits."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    bits = {name: tensor.detach().clone() for name, tensor in tensors.items() if not tensor.is_meta}
    return ([(name, id(m), type(m)) for name, m in model.named_modules()], {n: id(t) for n, t in tensors.items()}, bits)


def assert_untouched(model, before):
    modules, tensors, bits = snapshot(model)
    assert modules == before[0]
    assert tensors == before[1]
    for name, tensor in bits.items():
        torch.testing.assert_close(tensor, before[2][name], rtol=0, atol=0, equal_nan=True)
    assert not hasattr(model, "hf_device_map")
    assert not hasattr(model, "is_loaded_in_8bit")


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
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
                expected = layer.quantize(original[f"blocks.{index}.{leaf}.weight"].to(layer.weight.device))
                assert all(torch.equal(getattr(layer, key), value) for key, value in expected.items())
        assert type(model.head) is nn.Linear

    def test_the_output_is_that_of_the_dequantized_model(self, tiny, checkpoint, empty, ids, config):
        model = load_and_quantize_model(empty(tiny), checkpoint, config)
        plain = tiny()
        plain.load_state_dict(load_file(checkpoint / "model.safetensors"))
        device = next(model.parameters()).device
        expected = dequantized(model, plain)(ids)
        error = (model(ids.to(device)).cpu() - expected).norm() / expected.norm()
        assert error < (5e-3 if config.format == "int8" else 1e-5)

    @pytest.mark.parametrize("max_shard_size", ["20KB", "10GB"])
    def test_save_and_load_bit_for_bit(self, tiny, checkpoint, empty, ids, config, tmp_path, max_shard_size):
        model = load_and_quantize_model(empty(tiny), checkpoint, config)
        Accelerator().save_model(model, tmp_path / "saved", max_shard_size=max_shard_size)
        for again_config in (None, config):
            again = load_and_quantize_model(empty(tiny), tmp_path / "saved", again_config)
            assert again.state_dict().keys() == model.state_dict().keys()
            for name, tensor in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], tensor), name
                assert again.state_dict()[name].dtype == tensor.dtype
            x = ids.to(next(model.parameters()).device)
            assert torch.equal(again(x), model(x))

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

    def test_two_configs_are_refused(self, tiny, checkpoint, empty):
        config = QuantizationConfig("nf4")
        with pytest.raises(ConfigError, match="pass one"):
            load_and_quantize_model(empty(tiny), checkpoint, config, bnb_quantization_config=config)

    def test_marks_for_other_libraries(self, tiny, checkpoint, empty):
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu")
        assert model.quantization_method == "bigq"
        assert model.is_loaded_in_8bit is True
        assert not hasattr(model, "is_loaded_in_4bit")
        assert model.hf_device_map == {"": "cpu"}

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


class TestSharing:
    def test_one_linear_under_two_names_stays_one(self, tiny, empty, tmp_path, ids):
        class Shared(tiny):
            def __init__(self):
                super().__init__()
                self.blocks[2] = self.blocks[0]

        plain = Shared()
        for keep in ("blocks.0.", "blocks.2."):  # a checkpoint has either name, or both
            drop = "blocks.2." if keep == "blocks.0." else "blocks.0."
            state = {name: t.clone() for name, t in plain.state_dict().items() if not name.startswith(drop)}
            save_file(state, tmp_path / "model.safetensors")
            model = load_and_quantize_model(empty(Shared), tmp_path, QuantizationConfig("nf4"), "cpu")
            assert model.blocks[2] is model.blocks[0]
            assert model.blocks[2].up is model.blocks[0].up
            Accelerator().save_model(model, tmp_path / keep)
            again = load_and_quantize_model(empty(Shared), tmp_path / keep, device_map="cpu")
            assert torch.equal(again(ids), model(ids))

    @pytest.mark.parametrize("keep", ["embed.weight", "head.weight", None])
    def test_ties_stay_ties(self, tiny, empty, tmp_path, ids, keep):
        plain = tiny(tied=True)
        state = {name: t.clone() for name, t in plain.state_dict().items()}
        for name in {"embed.weight", "head.weight"} - {keep} if keep else ():
            del state[name]
        save_file(state, tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(tiny, tied=True), tmp_path, QuantizationConfig("int8"), "cpu")
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, plain.head.weight)


class TestTorchModels:
    def test_transformer_encoder_layers_run_their_linears(self, tmp_path, empty):
        def build():
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            return nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2), "head": nn.Linear(32, 4)})

        plain = build().eval()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(build), tmp_path, QuantizationConfig("nf4"), "cpu").eval()
        assert isinstance(model["body"].layers[1].linear2, QuantizedLinear)
        assert type(model["body"].layers[1].self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        x = torch.randn(2, 5, 32)
        expected = dequantized(model, plain)
        with torch.no_grad():
            torch.testing.assert_close(model["body"](x), expected["body"](x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu", "rnn": "disk", "up": "disk"}], ids=["cpu", "disk"])
    def test_recurrent_layers_follow_their_weights(self, tmp_path, empty, device_map):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.up, self.head = nn.LSTM(8, 8, num_layers=2), nn.Linear(8, 8), nn.Linear(8, 4)

            def forward(self, x):
                return self.head(self.up(self.rnn(x)[0]))

        plain = Recurrent()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(
            empty(Recurrent),
            tmp_path,
            QuantizationConfig("nf4"),
            device_map,
            offload="quantized",
            offload_folder=tmp_path,
        )
        x = torch.randn(5, 2, 8)
        expected = dequantized(model, plain)(x)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)

    def test_a_bare_linear(self, tmp_path, empty):
        plain = nn.Linear(40, 24)
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = empty(nn.Linear, in_features=40, out_features=24)
        assert load_and_quantize_model(model, tmp_path, QuantizationConfig("nf4"), "cpu") is model
        assert type(model) is QuantizedLinear
        x = torch.randn(3, 40)
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.dequantize(), plain.bias))
        Accelerator().save_model(model, tmp_path / "saved")
        again = empty(nn.Linear, in_features=40, out_features=24)
        assert torch.equal(load_and_quantize_model(again, tmp_path / "saved", device_map="cpu")(x), model(x))

    def test_what_refers_to_a_linear_follows_it(self, tmp_path, empty):
        """A closure, a list and a hook that were there before."""

        class Closure(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
                up = self.up
                self.listed = [up]
                self.run = lambda x: up(x)

            def forward(self, x):
                return self.head(self.run(x))

        save_file(Closure().state_dict(), tmp_path / "model.safetensors")
        model = empty(Closure)
        seen = []
        handle = model.up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
        load_and_quantize_model(model, tmp_path, QuantizationConfig("nf4"), "cpu")
        assert model.listed[0] is model.up
        assert model(torch.randn(2, 8)).isfinite().all()
        assert seen == [QuantizedLinear]
        handle.remove()
        model(torch.randn(2, 8))
        assert len(seen) == 1

    def test_odd_shapes(self, tmp_path, empty):
        def build():
            return nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1, bias=False), nn.Linear(1, 3))

        plain = build()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        for config in CONFIGS:
            model = load_and_quantize_model(empty(build), tmp_path, config, "cpu")
            x = torch.randn(4, 33)
            copy = build()
            copy.load_state_dict(plain.state_dict())
            expected = dequantized(model, copy)(x)
            assert (model(x) - expected).norm() <= 0.02 * expected.norm()


class TestRefusals:
    """Each refusal is one of the family, says its words, and leaves the model as it was."""

    def refused(self, model, *args, error, words, **kwargs):
        before = snapshot(model)
        with pytest.raises(error, match=words) as caught:
            load_and_quantize_model(model, *args, **kwargs)
        assert isinstance(caught.value, BigqError)
        assert_untouched(model, before)
        return str(caught.value)

    def write(self, folder, state):
        folder.mkdir(exist_ok=True)
        save_file(state, folder / "model.safetensors")
        return folder

    def test_everything_that_does_not_fit_in_one_error(self, tiny, empty, tmp_path):
        state = tiny().state_dict()
        del state["blocks.1.up.weight"], state["gain"]
        state["blocks.0.up.weight"] = torch.zeros(216, 71)
        state["blocks.0.norm.weight"] = torch.zeros(72, dtype=torch.int32)
        state["steps"] = torch.tensor(1.5)
        state["extra.weight"] = torch.zeros(3)
        folder = self.write(tmp_path / "bad", state)
        message = self.refused(
            empty(tiny), folder, QuantizationConfig("nf4"), error=CheckpointError, words="does not fit TinyModel"
        )
        for words in (
            "2 missing from the checkpoint",
            "blocks.1.up.weight: expected [216, 72]",
            "gain: expected [72] float32",
            "3 of the wrong shape or kind",
            f"blocks.0.up.weight in {folder / 'model.safetensors'}: expected shape [216, 72], found [216, 71]",
            "blocks.0.norm.weight in",
            "expected floating-point numbers, found int32",
            "expected integers, found float32",
            "1 unexpected",
            "extra.weight in",
        ):
            assert words in message

    def test_a_prefix_is_pointed_out(self, tiny, empty, tmp_path):
        state = {f"model.{name}": tensor for name, tensor in tiny().state_dict().items()}
        folder = self.write(tmp_path / "prefixed", state)
        message = self.refused(
            empty(tiny), folder, QuantizationConfig("nf4"), error=CheckpointError, words="does not fit"
        )
        assert message.endswith("hint: the checkpoint's names begin with 'model.' and the other's do not")

    def test_not_strict(self, tiny, empty, tmp_path, ids):
        state = tiny().state_dict()
        folder = self.write(tmp_path / "more", {**state, "extra": torch.zeros(2)})
        config = QuantizationConfig("nf4")
        self.refused(empty(tiny), folder, config, error=CheckpointError, words="strict=False ignores them")
        assert load_and_quantize_model(empty(tiny), folder, config, "cpu", strict=False)(ids).isfinite().all()
        del state["gain"]
        folder = self.write(tmp_path / "less", state)
        self.refused(empty(tiny), folder, config, error=CheckpointError, words="gain", strict=False)
        model = tiny()
        gain = model.gain.detach().clone()
        assert torch.equal(load_and_quantize_model(model, folder, config, "cpu", strict=False).gain, gain)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("config", CONFIGS, ids=name_of)
    def test_nan_and_inf(self, tiny, empty, tmp_path, config, bad):
        state = tiny().state_dict()
        state["blocks.1.down.weight"][3, 100] = bad
        folder = self.write(tmp_path / "nan", state)
        message = self.refused(empty(tiny), folder, config, error=CheckpointError, words="1 weights hold NaN or Inf")
        assert "blocks.1.down.weight in" in message
        loaded = tiny()
        loaded.load_state_dict(state)
        self.refused(loaded, None, config, error=CheckpointError, words=r"blocks\.1\.down\.weight in <TinyModel>")

    def test_nan_in_what_is_not_quantized_is_not_ours_to_judge(self, tiny, empty, tmp_path):
        state = tiny().state_dict()
        state["gain"][0] = float("-inf")
        folder = self.write(tmp_path / "inf", state)
        assert load_and_quantize_model(empty(tiny), folder, QuantizationConfig("nf4"), "cpu").gain[0] == -float("inf")

    def test_float8_is_refused_by_name(self, tiny, empty, tmp_path):
        state = tiny().state_dict()
        state["blocks.0.up.weight"] = state["blocks.0.up.weight"].to(torch.float8_e4m3fn)
        folder = self.write(tmp_path / "fp8", state)
        message = self.refused(empty(tiny), folder, QuantizationConfig("nf4"), error=CheckpointError, words="fit")
        assert "blocks.0.up.weight" in message
        assert "float8_e4m3fn (a scaled storage format" in message

    def test_no_config_for_plain_weights(self, tiny, empty, checkpoint):
        self.refused(empty(tiny), checkpoint, error=ConfigError, words="pass a quantization_config")

    def test_no_weights_for_meta(self, tiny, empty):
        self.refused(
            empty(tiny), quantization_config=QuantizationConfig("nf4"), error=CheckpointError, words="weights_location"
        )

    def test_a_buffer_that_no_file_holds(self, tiny, checkpoint):
        with torch.device("meta"):
            model = tiny()
        self.refused(
            model, checkpoint, QuantizationConfig("nf4"), error=CheckpointError, words="mask: .*init_empty_weights"
        )

    def test_nothing_to_quantize(self, empty, tmp_path):
        def build():
            return nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))

        save_file(build().state_dict(), tmp_path / "model.safetensors")
        self.refused(
            empty(build), tmp_path, QuantizationConfig("nf4"), error=UnsupportedError, words="nothing to quantize"
        )

    def test_a_model_that_is_quantized_already(self, tiny, checkpoint, empty):
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
        with pytest.raises(UnsupportedError, match="already holds QuantizedLinear"):
            load_and_quantize_model(model, checkpoint, QuantizationConfig("nf4"))

    def test_a_config_that_contradicts_the_checkpoint(self, tiny, checkpoint, empty, tmp_path):
        saved = tmp_path / "saved"
        Accelerator().save_model(
            load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu"), saved
        )
        for config, words in (
            (QuantizationConfig("fp4"), "'format': 'nf4'.*'format': 'fp4'"),
            (QuantizationConfig("nf4", block_size=32), "'block_size': 64.*'block_size': 32"),
            (QuantizationConfig("int8"), "'format': 'nf4'.*'format': 'int8'"),
            (QuantizationConfig("nf4", skip_modules=["up"]), "skip_modules 'up' matches blocks.0.up"),
        ):
            self.refused(empty(tiny), saved, config, error=ConfigError, words=words)
        computed = load_and_quantize_model(empty(tiny), saved, QuantizationConfig("nf4", compute_dtype="bf16"))
        assert computed.blocks[0].up.compute_dtype == torch.bfloat16

    def test_a_quantized_checkpoint_of_another_shape(self, tiny, checkpoint, empty, tmp_path):
        saved = tmp_path / "saved"
        Accelerator().save_model(
            load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu"), saved
        )
        self.refused(empty(tiny, width=64), saved, error=CheckpointError, words=r"expected shape \[192, 64\]")

    def test_device_maps(self, tiny, checkpoint, empty, tmp_path):
        config = QuantizationConfig("nf4")
        for device_map, words in (
            ({"block": "cpu"}, "key 'block' names no module or parameter; near: blocks"),
            ({"blocks": "cpu"}, "embed.weight has no place"),
            ("fast", "device_map is 'fast'"),
            ({}, "device_map is empty"),
            ({"": "cpu", "blocks.0": "disk"}, "pass offload_folder"),
        ):
            self.refused(empty(tiny), checkpoint, config, device_map, error=PlacementError, words=words)
        self.refused(
            empty(tiny), checkpoint, config, "auto", error=PlacementError, words="does not fit", max_memory={"cpu": 99}
        )

    def test_a_full_disk(self, tiny, checkpoint, empty, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        self.refused(
            empty(tiny),
            checkpoint,
            QuantizationConfig("nf4"),
            {"": "cpu", "blocks.0": "disk"},
            error=PlacementError,
            words="No space left",
            offload_folder=tmp_path / "offload",
        )

    def test_an_interrupt_in_the_middle(self, tiny, checkpoint, empty, monkeypatch):
        model = empty(tiny)
        before = snapshot(model)
        calls = []
        quantize = QuantizedLinear.quantize

        def interrupted(self, weight):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return quantize(self, weight)

        monkeypatch.setattr(QuantizedLinear, "quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_and_quantize_model(model, checkpoint, QuantizationConfig("nf4"))
        assert_untouched(model, before)

    def test_a_missing_shard(self, tiny, empty, tmp_path):
        index = {"weight_map": dict.fromkeys(tiny().state_dict(), "model-00001-of-00002.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(
            empty(tiny),
            tmp_path,
            QuantizationConfig("nf4"),
            error=CheckpointError,
            words=r"model-00001-of-00002\.safetensors",
        )


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
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the map of the offload file keeps its own descriptor
    del model
