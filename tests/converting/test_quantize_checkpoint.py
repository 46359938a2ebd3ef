"""quantize_checkpoint writes what load and save would write, bit for bit, and refuses what it cannot write."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import (
    FP4,
    NF4,
    CheckpointError,
    ConfigError,
    InputMoments,
    Int8,
    PlacementError,
    QuantizationConfig,
    UnsupportedError,
    load_and_quantize_model,
    quantize_checkpoint,
)
from quantized_folders import Wide, assert_same, load_and_save, read_folder, skeleton

MOMENTS = InputMoments(
    {f"blocks.{n}.{m}.weight": torch.rand(256 if m == 0 else 320) for n in range(3) for m in range(2)}
)
PAIRS = [  # every layout with what it can hold
    ("bigq", QuantizationConfig("nf4", method="search", moments=MOMENTS)),
    ("bigq", QuantizationConfig(NF4(double_quant=True), dtype="bf16")),
    ("bigq", QuantizationConfig("int8", also_quantize=["embed", "head"])),
    ("bitsandbytes", QuantizationConfig(FP4(block_size=32))),
    ("bitsandbytes", QuantizationConfig(NF4(double_quant=True))),
    ("bitsandbytes", QuantizationConfig(Int8(threshold=4.0), keep_in_fp32_modules=["blocks.0"])),
    ("compressed-tensors", QuantizationConfig("int8")),
]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(Wide().bfloat16().state_dict(), folder / "model.safetensors")
    return folder


def convert(source, to, config="nf4", model=None, **settings):
    model = skeleton() if model is None else model
    settings = {"device": "cpu"} | settings
    return quantize_checkpoint(source, to, config, model=model, progress=False, **settings)


@pytest.mark.parametrize("layout, config", PAIRS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_tensors_are_those_of_load_and_save(source, tmp_path, layout, config):
    expected = load_and_save(skeleton(), source, config, tmp_path / "expected", layout)
    model = skeleton()
    for size, count in (("5GB", 1), ("300KB", 2)):  # a budget of 1 MiB: larger tensors come in pieces
        to = tmp_path / size
        made = convert(source, to, config, model, layout=layout, max_shard_size=size, read_budget=1 << 20)
        assert len(made.files) >= count
        assert_same(to, expected)
        assert made.nbytes == sum(tensor.nbytes for tensor in read_folder(to).values())
        assert made.source_nbytes == sum(tensor.nbytes for tensor in Wide().bfloat16().state_dict().values())
        assert sorted(path.name for path in to.iterdir() if path.name not in made.files) == [
            "README.md",
            *(["config.json"] if layout != "bigq" else []),
            *(["model.safetensors.index.json"] if len(made.files) > 1 else []),
        ]
        if layout != "bigq":
            assert (to / "config.json").read_text() == (expected / "config.json").read_text()
    assert type(model.blocks[0][0]) is nn.Linear, "the skeleton is left as it was"
    assert list(model.state_dict()) == list(Wide().state_dict())


@pytest.mark.gpu
def test_a_gpu_writes_the_tensors_of_load_and_save(source, tmp_path):
    for number, (layout, config) in enumerate(PAIRS):
        expected = tmp_path / f"expected-{number}"
        load_and_save(skeleton(), source, config, expected, layout, device_map="cuda")
        for budget in (None, 1 << 20):
            to = tmp_path / f"{number}-{budget}"
            convert(source, to, config, layout=layout, read_budget=budget, max_shard_size="300KB", device="cuda")
            assert_same(to, expected)


@pytest.mark.parametrize("tied_in_file", [True, False])
def test_tied_weights_are_written_once(tmp_path, tied_in_file):
    state = Wide(tied=True).state_dict()
    if tied_in_file:
        del state["head.weight"]
    torch.save(state, tmp_path / "model.bin")  # a pickle
    for number, config in enumerate((NF4(), QuantizationConfig("nf4", also_quantize=["embed", "head"]))):
        expected = load_and_save(skeleton(tied=True), tmp_path / "model.bin", config, tmp_path / f"expected{number}")
        convert(tmp_path / "model.bin", tmp_path / f"{number}", config, skeleton(tied=True))
        assert_same(tmp_path / f"{number}", expected)


def test_a_sharded_source_and_one_whose_order_is_another(tmp_path):
    state = Wide().state_dict()
    names = sorted(state, reverse=True)
    (tmp_path / "source").mkdir()
    for number in range(3):
        held = {name: state[name] for name in names[number::3]}
        save_file(held, tmp_path / "source" / f"model-{number + 1:05d}-of-00003.safetensors")
    expected = load_and_save(skeleton(), tmp_path / "source", "nf4", tmp_path / "expected")
    convert(tmp_path / "source", tmp_path / "to", max_shard_size="300KB")
    assert_same(tmp_path / "to", expected)


def test_it_loads_and_the_result_says_what_it_is(source, tmp_path):
    made = convert(source, tmp_path / "to", metadata={"of": "wide"})
    assert (made.folder, made.layout, made.files) == (tmp_path / "to", "bigq", ("model.safetensors",))
    assert (made.quantized, made.kept, made.resumed) == (6, 9, 0)
    assert json.loads(json.dumps(made.to_dict()))["folder"] == str(tmp_path / "to")
    assert {stage.name for stage in made.stages} >= {"plan", "read", "quantize", "write"}
    model = load_and_quantize_model(skeleton(), tmp_path / "to", device_map="cpu", progress=False)
    assert model.blocks[0][0].descriptions["weight"].format == NF4()


def test_what_is_missing_or_unexpected_if_it_may_be(tmp_path):
    state = {**Wide().state_dict(), "extra": torch.ones(2)}
    del state["steps"], state["blocks.0.0.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="strict=False"):
        convert(tmp_path / "model.safetensors", tmp_path / "to", model=Wide())
    config, model = QuantizationConfig("nf4", dtype="bf16"), Wide()
    convert(tmp_path / "model.safetensors", tmp_path / "to", config, model, strict=False)
    found = read_folder(tmp_path / "to")
    assert found["steps"] == 7
    assert torch.equal(found["blocks.0.0.bias"], model.blocks[0][0].bias.bfloat16())
    assert found["blocks.0.0.bias"].dtype == torch.bfloat16
    assert "extra" not in found
    assert model.blocks[0][0].bias.dtype == torch.float32, "the model is left as it was"


def test_the_index_says_where_every_tensor_is(source, tmp_path):
    made = convert(source, tmp_path / "to", max_shard_size="300KB", metadata={"of": "wide"})
    index = json.loads((tmp_path / "to" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": made.nbytes, "of": "wide"}
    assert sorted(set(index["weight_map"].values())) == list(made.files)
    for file in made.files:
        alone = tmp_path / "alone"
        shutil.rmtree(alone, ignore_errors=True)
        alone.mkdir()
        shutil.copy(tmp_path / "to" / file, alone)
        assert read_folder(alone).keys() == {name for name, held in index["weight_map"].items() if held == file}


class Scaled(nn.Module):
    """A model whose state dict holds what is none of its tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(64, 64), nn.Linear(64, 2)
        self.register_state_dict_post_hook(lambda module, state, *_: state.update(extra=torch.zeros(2)))


class Stateful(nn.Linear):
    def get_extra_state(self):
        return torch.ones(2)

    def set_extra_state(self, state):
        pass


class TestRefusals:
    def refused(self, words, error, source, tmp_path, *args, **settings):
        with pytest.raises(error, match=words):
            convert(source, tmp_path / "to", *args, **settings)
        assert not (tmp_path / "to").exists() or [path.name for path in (tmp_path / "to").iterdir()] == [
            ".bigq-quantize"
        ]

    def test_arguments(self, source, tmp_path):
        for settings, words in (
            ({"layout": "gguf"}, "layout is 'gguf'; expected one of"),
            ({"max_shard_size": "large"}, "max_shard_size is 'large'; expected bytes"),
            ({"max_shard_size": 0}, "expected at least one byte"),
            ({"config": None}, "quantization_config is None"),
            ({"config": QuantizationConfig("nf4", skip_modules=["blokcs"])}, "blokcs"),
        ):
            self.refused(words, ConfigError, source, tmp_path, **settings)
        for same in (source, source / "model.safetensors"):
            with pytest.raises(ConfigError, match="source and destination are both"):
                convert(same, source, overwrite=True)
        assert (source / "model.safetensors").exists()

    def test_a_layout_that_cannot_hold_a_weight(self, source, tmp_path):
        words = "'compressed-tensors' cannot hold 6 weights"
        self.refused(words, UnsupportedError, source, tmp_path, layout="compressed-tensors")

    def test_a_source_that_is_quantized(self, source, tmp_path):
        convert(source, tmp_path / "nf4")
        self.refused("is quantized already", UnsupportedError, tmp_path / "nf4", tmp_path)

    def test_numbers_that_cannot_be_quantized(self, source, tmp_path):
        state = Wide().state_dict()
        for value in (float("nan"), float("inf")):
            state["blocks.1.0.weight"][3, 5] = value
            save_file(state, source / "model.safetensors")
            for settings in ({}, {"layout": "bitsandbytes"}, {"read_budget": 1 << 20}):
                words = r"1 weights hold NaN or Inf and cannot be quantized: blocks\.1\.0\.weight in .*model\.safetens"
                self.refused(words, CheckpointError, source, tmp_path, overwrite=True, **settings)

    def test_a_missing_tensor(self, source, tmp_path):
        state = Wide().state_dict()
        del state["blocks.0.0.weight"]
        save_file(state, source / "model.safetensors")
        self.refused(r"blocks\.0\.0\.weight", CheckpointError, source, tmp_path)

    def test_a_state_dict_with_more_than_tensors_of_the_model(self, tmp_path):
        state = {k: v for k, v in Scaled().state_dict().items() if k != "extra"}
        save_file(state, tmp_path / "model.safetensors")
        words = "holds what is none of its tensors, or lacks some: extra"
        self.refused(words, UnsupportedError, tmp_path / "model.safetensors", tmp_path, model=Scaled())

    def test_extra_states(self, tmp_path):
        model = nn.Sequential(Stateful(64, 64), nn.Linear(64, 2))
        torch.save(model.state_dict(), tmp_path / "model.bin")
        self.refused("holds extra states of modules", UnsupportedError, tmp_path / "model.bin", tmp_path, model=model)

    def test_too_little_space(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        self.refused(r"has 1,000 bytes of free space, and the weights take", PlacementError, source, tmp_path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_may_not_be_written_to(self, source, tmp_path):
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            convert(source, tmp_path / "closed" / "to")
