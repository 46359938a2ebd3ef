"""QuantizationConfig: values and refusals."""

import copy
import dataclasses
import gc
import json
import pickle
import re
import weakref

import pytest
import torch

from bigq import ConfigError, InputMoments, QuantizationConfig
from bigq.formats import FP4, NF4, Int8


def test_defaults():
    config = QuantizationConfig("nf4")
    assert config.weight_format() == NF4(block_size=64, double_quant=False)
    assert (config.compute_dtype, config.dtype, config.skip_modules, config.offload) == (None, None, (), None)
    assert QuantizationConfig("int8").weight_format() == Int8(threshold=6.0)


def test_to_ask_for_the_method_keeps_no_frame_alive():
    class Held:
        pass

    def ask():
        held = Held()
        assert QuantizationConfig("nf4").quant_method == "bigq"
        return weakref.ref(held)

    gc.disable()
    try:
        assert ask()() is None
    finally:
        gc.enable()


def test_a_format_with_its_settings_is_the_same_as_its_name_and_the_settings():
    assert QuantizationConfig(FP4(block_size=32, double_quant=True)) == QuantizationConfig(
        "fp4", block_size=32, double_quant=True
    )
    assert QuantizationConfig(NF4()) != QuantizationConfig(FP4())
    assert QuantizationConfig(Int8(threshold=0.0)).format == Int8(threshold=0.0)
    assert hash(QuantizationConfig(NF4())) == hash(QuantizationConfig("nf4"))


def test_replace_keeps_the_format():
    config = dataclasses.replace(QuantizationConfig("nf4", block_size=32), dtype="bf16")
    assert config == QuantizationConfig(NF4(block_size=32), dtype=torch.bfloat16)


@pytest.mark.parametrize("name, kind", [("NF4", NF4), ("Fp4", FP4), ("INT8", Int8)])
def test_a_format_by_its_name_in_capitals(name, kind):
    assert QuantizationConfig(name) == QuantizationConfig(kind())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"load_in_4bit": True}, r"write QuantizationConfig\('nf4'\) for load_in_4bit"),
        ({"load_in_8bit": True}, r"write QuantizationConfig\('int8'\) for load_in_8bit"),
        ({"format": "nf4", "bnb_4bit_use_double_quant": True}, "write double_quant=True for bnb_4bit_use_double_quant"),
        ({"format": "int8", "llm_int8_threshold": 5.0}, r"write threshold=6\.0 for llm_int8_threshold"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}, "for load_in_4bit, write compute_dtype="),
        ({"format": "nf4", "torch_dtype": "bf16"}, r"write dtype=torch\.bfloat16 for torch_dtype"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_by_the_names_of_others_say_what_to_write(settings, words):
    with pytest.raises(ConfigError, match=words):
        QuantizationConfig(**settings)


def test_copies_are_equal():
    config = QuantizationConfig("nf4", block_size=32, skip_modules=["a"])
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config


def test_moments_are_read_from_a_file_and_are_no_part_of_what_is_said_or_saved(tmp_path):
    moments = InputMoments({"a.weight": torch.ones(3)})
    moments.save(tmp_path / "m.safetensors")
    config = QuantizationConfig("nf4", method="search", moments=moments)
    for given in (tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
        read = QuantizationConfig("nf4", method="search", moments=given)
        assert torch.equal(read.required_moments()["a.weight"], torch.ones(3))
    bare = QuantizationConfig("nf4", method="search")
    assert config == read == bare
    assert hash(config) == hash(bare)
    assert repr(config) == repr(bare)
    assert config.to_dict() == bare.to_dict()
    assert config.to_dict()["method"] == "search"
    assert "moments" not in config.to_dict()
    copied = dataclasses.replace(config, compute_dtype=torch.bfloat16)
    assert copied.required_moments() is moments
    with pytest.raises(ConfigError, match=r"pass moments=bigq.input_moments\(model\)"):
        QuantizationConfig.from_dict(config.to_dict()).required_moments()


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationConfig("nf4").block_size = 32  # type: ignore[misc]
    with pytest.raises(TypeError):
        QuantizationConfig("nf4", 32)  # type: ignore[misc]


def test_lists_are_copied():
    names = ["head"]
    config = QuantizationConfig("nf4", skip_modules=names)  # type: ignore[arg-type]
    names.append("body")
    assert config.skip_modules == ("head",)
    assert hash(config) == hash(QuantizationConfig("nf4", skip_modules=("head",)))


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "BF16", "torch.bfloat16", torch.bfloat16])
def test_dtype_names(name):
    assert QuantizationConfig("nf4", compute_dtype=name).compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"format": "int4"}, "'nf4', 'fp4' or 'int8'"),
        ({"format": "nf4", "block_size": 48}, "32, 64, 128"),
        ({"format": "nf4", "threshold": 3.0}, "threshold=3.0 means nothing to format 'nf4'"),
        ({"format": "int8", "double_quant": True}, "double_quant=True means nothing"),
        ({"format": "int8", "block_size": 128}, "block_size=128 means nothing"),
        ({"format": "int8", "threshold": -1.0}, "a finite number >= 0"),
        ({"format": "int8", "threshold": float("nan")}, "a finite number >= 0"),
        ({"format": "nf4", "double_quant": 1}, "True or False"),
        ({"format": NF4(), "block_size": 32}, "block_size=32 beside NF4"),
        ({"format": Int8(), "threshold": 0.0}, "threshold=0.0 beside Int8"),
        ({"format": NF4}, "format is .*NF4"),
        ({"format": None}, "a config needs a format or rules: 'nf4', 'fp4', 'int8'"),
        ({"format": ["nf4"]}, r"format is \['nf4'\]; expected 'nf4'"),
        ({"format": "nf4", "block_size": 32.0}, r"block_size is 32\.0"),
        ({"format": "nf4", "block_size": True}, "block_size is True"),
        ({"format": "int8", "threshold": 10**400}, "a finite number >= 0"),
        ({"format": "nf4", "compute_dtype": torch.int64}, r"compute_dtype is torch\.int64"),
        ({"format": "nf4", "dtype": "_inductor"}, "dtype is '_inductor'"),
        ({"format": "nf4", "dtype": ["bf16"]}, r"dtype is \['bf16'\]"),
        ({"format": "nf4", "skip_modules": 5}, "skip_modules is 5; expected a list"),
        ({"format": "int8", "method": "search"}, "method='search' means nothing to int8: leave it out"),
        ({"format": "nf4", "moments": InputMoments({})}, "moments beside method='absmax': pass method='search'"),
        ({"format": "nf4", "method": "search", "moments": {}}, "moments is a dict; expected bigq.InputMoments"),
        ({"format": "nf4", "method": "best"}, r"method is 'best'; expected one of \['absmax', 'search'\]"),
        ({"format": "nf4", "also_quantize": "embed"}, r"expected a list of them: \['embed'\]"),
        ({"format": "nf4", "also_quantize": ["a..b"]}, "also_quantize holds 'a..b'"),
        ({"format": "nf4", "skip_defaults": 1}, "skip_defaults is 1; expected True or False"),
        ({"format": "nf4", "compute_dtype": "fp8"}, "compute_dtype is 'fp8'"),
        ({"format": "nf4", "dtype": torch.int8}, "dtype is torch.int8"),
        ({"format": "nf4", "skip_modules": "head"}, r"expected a list of them: \['head'\]"),
        ({"format": "nf4", "skip_modules": [""]}, "a module path, a name, a glob or"),
        ({"format": "nf4", "keep_in_fp32_modules": [3]}, "keep_in_fp32_modules holds 3"),
        ({"format": "nf4", "offload": "disk"}, "'preserve', 'quantized' or torch.float32"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items() if k != "format") if isinstance(value, dict) else ""
    ),
)
def test_refusals(arguments, words):
    with pytest.raises(ConfigError, match=words):
        QuantizationConfig(**arguments)


class TestRules:
    def test_they_are_pairs_in_their_order(self):
        config = QuantizationConfig(
            "nf4", rules={"re:.*k_proj": "INT8", "lm_head": NF4(block_size=32), "visual.*": None}
        )
        assert config.rules == (("re:.*k_proj", Int8()), ("lm_head", NF4(block_size=32)), ("visual.*", None))
        assert config.formats() == (NF4(), Int8(), NF4(block_size=32))
        assert hash(config) == hash(QuantizationConfig("nf4", rules=config.rules))

    def test_they_do_without_a_format(self):
        config = QuantizationConfig(rules={"lm_head": "int8"})
        assert config.weight_format() is None
        assert config.formats() == (Int8(),)

    @pytest.mark.parametrize(
        "arguments, words",
        [
            pytest.param({}, "needs a format or rules", id="neither"),
            pytest.param({"block_size": 32, "rules": {"a": "nf4"}}, "block_size=32 without a format", id="settings"),
            pytest.param({"rules": "lm_head"}, "rules is 'lm_head'; expected", id="a-string"),
            pytest.param({"rules": {"a": "int5"}}, "'int5'", id="unknown-format"),
            pytest.param({"rules": {"re:(": "int8"}}, "no regular expression", id="bad-regex"),
            pytest.param({"rules": {"a..b": "int8"}}, "rules holds 'a..b'", id="bad-glob"),
            pytest.param({"rules": ["a"]}, "rules holds 'a'", id="no-pair"),
        ],
    )
    def test_refusals(self, arguments, words):
        with pytest.raises(ConfigError, match=re.escape(words)):
            QuantizationConfig(**arguments)

    def test_they_survive_json(self):
        rules = {"re:.*k_proj": Int8(threshold=0.0), "lm_head": NF4(block_size=32, double_quant=True), "visual": None}
        for config in (QuantizationConfig("fp4", rules=rules), QuantizationConfig(rules=rules)):
            saved = json.loads(json.dumps(config.to_dict(), sort_keys=True))
            assert QuantizationConfig.from_dict(saved) == config

    @pytest.mark.parametrize("saved", [{"a": 1}, [["a"]], [["a", 4]], "a"], ids=str)
    def test_saved_ones_are_looked_at(self, saved):
        with pytest.raises(ConfigError, match=r"rules holds .*; expected a list of a pattern"):
            QuantizationConfig.from_dict({**QuantizationConfig("nf4").to_dict(), "rules": saved})
