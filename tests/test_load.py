"""load_and_quantize_model: what arrives in which model, under which arguments."""

import copy
import gc
import sys
import weakref
from dataclasses import replace

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


def dequantized(model, source):
    """`source` with the weights that `model`'s quantized layers stand for, and nothing else of bigq."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            source.get_submodule(name).weight.data = module.dequantize(torch.float32).cpu()
    return source


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


class TestReading:
    """However the weights are read, the same bits arrive."""

    @pytest.fixture
    def wide(self, tiny, tmp_path):
        """Weights of more than a megabyte, so that the smallest budget cuts them into pieces."""

        def build():
            return tiny(width=320, blocks=2, vocabulary=2000)

        save_file(build().state_dict(), tmp_path / "wide.safetensors")
        return build, tmp_path / "wide.safetensors"

    def assert_same(self, model, other):
        assert model.state_dict().keys() == other.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name

    def test_any_budget(self, wide, empty, config):
        build, path = wide
        config = replace(config, dtype=torch.bfloat16)  # kept tensors are cast, so they come in pieces too
        model = load_and_quantize_model(empty(build), path, config)
        for threads in (1, 5):
            small = load_and_quantize_model(empty(build), path, config, read_threads=threads, read_budget=1 << 20)
            self.assert_same(model, small)
        tensors = list(small.state_dict().values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors), "each owns its storage"

    def test_a_pickle(self, wide, empty, config):
        build, path = wide
        torch.save(load_file(path), path.with_suffix(".bin"))
        model = load_and_quantize_model(empty(build), path, config)
        self.assert_same(model, load_and_quantize_model(empty(build), path.with_suffix(".bin"), config))

    def test_in_place(self, wide, empty, config):
        build, path = wide
        plain = build()
        plain.load_state_dict(load_file(path))
        model = load_and_quantize_model(empty(build), path, config)
        self.assert_same(model, load_and_quantize_model(plain, None, config))

    def test_the_collector_is_as_it_was(self, tiny, checkpoint, empty):
        for enabled in (True, False):
            (gc.enable if enabled else gc.disable)()
            try:
                load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
                assert gc.isenabled() is enabled
                with pytest.raises(ConfigError):
                    load_and_quantize_model(empty(tiny), checkpoint)
                assert gc.isenabled() is enabled
            finally:
                gc.enable()

    @pytest.mark.gpu
    @pytest.mark.parametrize("spread", [False, True], ids=["resident", "half on the cpu"])
    def test_memory_on_the_way(self, wide, empty, config, spread):
        build, path = wide
        load_and_quantize_model(empty(build), path, config)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = load_and_quantize_model(
            empty(build),
            path,
            config,
            {"": 0, "blocks.0": "cpu"} if spread else {"": 0},
            offload="quantized",
            read_budget=1 << 20,
        )
        result = sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.is_cuda)
        assert torch.cuda.max_memory_allocated() - before <= 1.1 * result + (2 << 20)

    @pytest.mark.gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_two_gpus(self, wide, empty, config):
        build, path = wide
        one = load_and_quantize_model(empty(build), path, config, {"": 0})
        two = load_and_quantize_model(
            empty(build), path, config, {"": 0, "blocks.1": 1, "head": 1}, read_budget=1 << 20
        )
        assert {str(tensor.device) for tensor in two.state_dict().values()} == {"cuda:0", "cuda:1"}
        for name, tensor in one.state_dict().items():
            assert torch.equal(two.state_dict()[name].cpu(), tensor.cpu()), name


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

    @pytest.mark.parametrize("also_called", [False, True], ids=["only read", "read and called"])
    def test_a_linear_whose_weight_its_parent_reads(self, tmp_path, empty, config, also_called):
        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.head = nn.Linear(72, 40), nn.Linear(40, 4)

            def forward(self, x):
                dtype, (rows, columns) = self.up.weight.dtype, self.up.weight.shape
                read = nn.functional.linear(x.to(dtype), self.up.weight, self.up.bias)
                read = read + x @ self.up.weight.t() + self.up.weight.abs().amax() + rows / columns
                return self.head(read + self.up(x) if also_called else read)

        plain = Reads()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(Reads), tmp_path, config, "cpu")
        assert type(model.up) is QuantizedLinear
        x = torch.randn(5, 72)
        expected = dequantized(model, plain)(x)
        error = (model(x) - expected).norm() / expected.norm()
        assert error < (2e-2 if config.weight_format().name == "int8" else 1e-5)

    def test_a_subclass_of_linear_stays_an_instance_of_its_class(self, tmp_path, empty):
        class Marked(nn.Linear):
            mark = "mine"

        def build():
            return nn.Sequential(Marked(40, 24), nn.ReLU(), nn.Linear(24, 4))

        plain = build()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(build), tmp_path, QuantizationConfig("nf4"), "cpu")
        assert isinstance(model[0], Marked)
        assert isinstance(model[0], QuantizedLinear)
        assert model[0].mark == "mine"
        x = torch.randn(3, 40)
        expected = dequantized(model, plain)(x)
        torch.testing.assert_close(model(x), expected)
        copied = copy.deepcopy(model)
        assert type(copied[0]) is type(model[0])
        assert torch.equal(copied(x), model(x))

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

    def test_odd_shapes(self, tmp_path, empty, configs):
        def build():
            return nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1, bias=False), nn.Linear(1, 3))

        plain = build()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        for config in configs:
            model = load_and_quantize_model(empty(build), tmp_path, config, "cpu")
            x = torch.randn(4, 33)
            other = build()
            other.load_state_dict(plain.state_dict())
            expected = dequantized(model, other)(x)
            assert (model(x) - expected).norm() <= 0.02 * expected.norm()


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


def test_an_interrupted_commit_leaves_the_model_as_it_was(tiny, checkpoint, monkeypatch):
    import bigq.loading.jobs

    model, commit, calls = tiny(), bigq.loading.jobs.commit_weight, []
    before = [(module, type(module), dict(module._parameters)) for module in model.modules()]

    def interrupted(*args, **kwargs):
        commit(*args, **kwargs)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(bigq.loading.jobs, "commit_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_and_quantize_model(model, checkpoint, QuantizationConfig("nf4"), "cpu")
    assert len(calls) == 3
    for module, kind, parameters in before:
        assert type(module) is kind
        assert module._parameters.keys() == parameters.keys()
        assert all(module._parameters[name] is tensor for name, tensor in parameters.items())
