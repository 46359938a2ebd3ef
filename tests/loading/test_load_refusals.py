"""What load_and_quantize_model refuses, each with an error of ours, and that a refused call changes nothing."""

import _thread
import json
import os
import signal
import sys
import threading
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import (
    BigqError,
    CheckpointError,
    ConfigError,
    PlacementError,
    QuantizationConfig,
    UnsupportedError,
    load_and_quantize_model,
)
from bigq.formats import Block4


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

    def test_everything_that_does_not_fit_in_one_error(self, tiny, empty, tmp_path, monkeypatch):
        """And no tensor is read before that."""
        reads, preadv = [], os.preadv
        monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args) or preadv(*args))
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
        assert not reads

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

    def test_float8_with_a_scale_of_an_unknown_name_is_refused_by_name(self, tiny, empty, tmp_path):
        state = tiny().state_dict()
        state["blocks.0.up.scale_weight"] = torch.ones(1)
        state["blocks.0.up.weight"] = state["blocks.0.up.weight"].to(torch.float8_e4m3fn)
        folder = self.write(tmp_path / "fp8", state)
        words = "1 tensors in FP8 have a scale of an unknown kind"
        message = self.refused(empty(tiny), folder, QuantizationConfig("nf4"), error=CheckpointError, words=words)
        assert "blocks.0.up.scale_weight of blocks.0.up.weight in" in message

    def test_what_is_no_path(self, tiny, empty):
        config = QuantizationConfig("nf4")
        self.refused(empty(tiny), 3, config, error=CheckpointError, words="weights_location is 3; expected a path")
        state = empty(tiny).state_dict()
        self.refused(empty(tiny), state, config, error=CheckpointError, words="load a state dict into the model")

    def test_float8_without_a_scale_is_a_cast_beside_others(self, tiny, empty, tmp_path, config):
        state = tiny().state_dict()
        state["blocks.0.up.weight"] = state["blocks.0.up.weight"].to(torch.float8_e4m3fn)
        model = load_and_quantize_model(empty(tiny), self.write(tmp_path / "fp8", state), config, "cpu")
        expected = tiny()
        expected.load_state_dict(state)
        expected = load_and_quantize_model(expected, None, config, "cpu").state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

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
            empty(build),
            tmp_path,
            QuantizationConfig("nf4"),
            error=UnsupportedError,
            words="nothing to quantize in Sequential:\n  it has no linear, .*\n.* also_quantize may name: 0.weight$",
        )

    def test_nothing_but_experts_of_a_class_that_is_not_known(self, empty, tmp_path):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.router = nn.Linear(8, 4, bias=False)
                self.experts = nn.ParameterDict({"up": torch.zeros(4, 16, 8), "down": torch.zeros(4, 8, 8)})
                self.places = nn.Parameter(torch.zeros(4, 2, dtype=torch.int32), requires_grad=False)

        save_file(Experts().state_dict(), tmp_path / "model.safetensors")
        self.refused(
            empty(Experts),
            tmp_path,
            QuantizationConfig("nf4"),
            error=UnsupportedError,
            words="router: the router of experts\n.* also_quantize may name: experts.up, experts.down$",
        )

    def test_a_model_that_is_quantized_already(self, tiny, checkpoint, empty):
        model = load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"))
        with pytest.raises(UnsupportedError, match="is quantized already: pass weights_location to load it again"):
            load_and_quantize_model(model, None, QuantizationConfig("nf4"))

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
            (QuantizationConfig("nf4", skip_modules=["up.weight"]), "skip_modules 'up.weight' matches blocks.0.up"),
            (QuantizationConfig("nf4", skip_modules=["ups"]), "matches no module or parameter"),
        ):
            self.refused(empty(tiny), saved, config, error=ConfigError, words=words)
        for config in (
            QuantizationConfig("nf4", skip_modules=["head.weight"]),
            QuantizationConfig("nf4", skip_modules=["up.bias"]),
        ):
            load_and_quantize_model(empty(tiny), saved, config)  # nothing of that is quantized
        computed = load_and_quantize_model(empty(tiny), saved, QuantizationConfig("nf4", compute_dtype="bf16"))
        assert computed.blocks[0].up.compute_dtype == torch.bfloat16

    def test_a_quantized_checkpoint_of_another_shape(self, tiny, checkpoint, empty, tmp_path):
        saved = tmp_path / "saved"
        Accelerator().save_model(
            load_and_quantize_model(empty(tiny), checkpoint, QuantizationConfig("nf4"), "cpu"), saved
        )
        self.refused(empty(tiny, width=64), saved, error=CheckpointError, words=r"expected shape \[192, 64\]")
        words = r"blocks\.2\.up\.weight is quantized in the checkpoint, but the model has no such parameter"
        self.refused(empty(tiny, blocks=2), saved, error=CheckpointError, words=words)
        state = load_file(saved / "model.safetensors")
        state["blocks.0.up.weight_absmax"] = state["blocks.0.up.weight_absmax"].long()
        words = r"blocks\.0\.up\.weight_absmax in .*: expected torch\.int32, found torch\.int64"
        self.refused(empty(tiny), self.write(tmp_path / "wide", state), error=CheckpointError, words=words)

    def test_a_quantized_checkpoint_that_unties_what_the_model_ties(self, tiny, empty, tmp_path):
        states = [
            load_and_quantize_model(tiny(), None, QuantizationConfig(name, also_quantize=[leaf]), "cpu").state_dict()
            for name, leaf in (("nf4", "embed"), ("fp4", "head"))
        ]
        head = {name: tensor for name, tensor in states[1].items() if name.startswith("head.")}
        both = {**{name: tensor for name, tensor in states[0].items() if name != "head.weight"}, **head}
        model = empty(tiny, tied=True)
        folder = self.write(tmp_path / "floats", states[1])
        words = r"head\.weight is quantized in the checkpoint, which holds embed\.weight as floats; the model ties them"
        self.refused(model, folder, error=CheckpointError, words=words)
        words = r"head\.weight is tied to embed\.weight, which the checkpoint holds in another format"
        self.refused(model, self.write(tmp_path / "both", both), error=CheckpointError, words=words)

    @pytest.mark.parametrize("build", [nn.Embedding, nn.EmbeddingBag], ids=lambda build: build.__name__)
    def test_an_embedding_that_renormalizes_its_weight(self, tmp_path, empty, build):
        class Model(nn.Module):
            def __init__(self, max_norm=1.0):
                super().__init__()
                self.embed, self.up = build(50, 32, max_norm=max_norm), nn.Linear(32, 32)
                self.head = nn.Linear(32, 50, bias=False)
                self.head.weight = self.embed.weight

        floats = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
        folder = self.write(tmp_path / "floats", floats)
        words = rf"embed is a {build.__name__} with max_norm=1\.0.*do not name it in the config"
        for name in ("embed", "head.weight"):
            config = QuantizationConfig("nf4", also_quantize=[name])
            self.refused(empty(Model), folder, config, error=UnsupportedError, words=words)
        quantized = load_and_quantize_model(empty(Model, max_norm=None), folder, config, "cpu")
        state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
        saved = self.write(tmp_path / "saved", state)
        self.refused(empty(Model), saved, error=UnsupportedError, words=words)
        model = load_and_quantize_model(empty(Model), folder, QuantizationConfig("nf4"), "cpu")
        ids = torch.tensor([[1, 3]])
        model.embed(ids)
        assert model.embed.weight[ids].norm(dim=-1).max() <= 1.0001, "kept, and renormalized as torch does"

    def test_device_maps(self, tiny, checkpoint, empty, tmp_path):
        config = QuantizationConfig("nf4")
        for device_map, words in (
            ({"block": "cpu"}, "key 'block' names no module or parameter; near: blocks"),
            ({"blocks": "cpu"}, "embed.weight has no place"),
            ("fast", "device_map is 'fast'"),
            ({}, "device_map is empty"),
        ):
            self.refused(
                empty(tiny), checkpoint, config, device_map, error=PlacementError, words=words, offload="quantized"
            )
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
            offload="quantized",
            offload_folder=tmp_path / "offload",
        )

    @pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
    def test_a_disk_that_is_full_indeed(self, tiny, checkpoint, empty, tmp_path):
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # what the disk would still hold
        try:
            self.refused(
                empty(tiny),
                checkpoint,
                QuantizationConfig("nf4"),
                {"": "cpu", "blocks.0": "disk"},
                error=PlacementError,
                words="cannot reserve .* GB",
                offload_folder=tmp_path / "offload",
                offload="quantized",  # what keeps its dtype would rest in the checkpoint, unwritten
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list((tmp_path / "offload").iterdir()) == []

    def test_a_read_error_in_one_thread(self, tiny, checkpoint, empty, monkeypatch):
        def failing(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.preadv", failing)
        tasks = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            self.refused(
                empty(tiny), checkpoint, QuantizationConfig("nf4"), error=CheckpointError, words="Input/output error"
            )
        for _ in range(100):  # a thread ends a moment after its work
            if len(os.listdir("/proc/self/task")) <= tasks:
                break
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/task")) <= tasks

    @pytest.mark.parametrize("name", ["read_threads", "read_budget"])
    def test_budgets(self, tiny, checkpoint, empty, name):
        self.refused(empty(tiny), checkpoint, QuantizationConfig("nf4"), error=ConfigError, words=name, **{name: 0})

    def test_an_interrupt_while_it_waits_for_a_file(self, tiny, checkpoint, empty, monkeypatch):
        """Ctrl-C comes while the main thread waits and a read hangs for a while."""
        model = empty(tiny)
        before, threads, preadv = snapshot(model), {*threading.enumerate()}, os.preadv

        def slow(*args):
            _thread.interrupt_main()
            time.sleep(0.2)
            return preadv(*args)

        monkeypatch.setattr("os.preadv", slow)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        try:
            with pytest.raises(KeyboardInterrupt):
                load_and_quantize_model(model, checkpoint, QuantizationConfig("nf4"), read_threads=1)
        finally:
            signal.signal(signal.SIGINT, handler)
        assert {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"} <= threads
        assert_untouched(model, before)

    def test_an_interrupt_in_the_middle(self, tiny, checkpoint, empty, monkeypatch):
        model = empty(tiny)
        before = snapshot(model)
        calls = []
        finish = Block4.finish

        def interrupted(self, rows, shape):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return finish(self, rows, shape)

        monkeypatch.setattr(Block4, "finish", interrupted)
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
