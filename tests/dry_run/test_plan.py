"""A dry run says what the load then does: every row is compared with the tensors of the loaded model."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

import bigq
from bigq import NF4, CheckpointError, ConfigError, PlacementError, QuantizationConfig, UnsupportedError
from bigq.footprint import KINDS
from bigq.formats import dtype_name
from bigq.model.tree import ModelTree, find_owner, nbytes_of
from bigq.weight.quantized_module import QuantizedModule

CONFIGS = {
    "nf4": QuantizationConfig("nf4"),
    "int8 without defaults, cast": QuantizationConfig("int8", dtype=torch.bfloat16, also_quantize=["embed"]),
    "rules": QuantizationConfig(
        "nf4", rules={"head": "int8", "blocks.1": None, "re:.*up": NF4(block_size=32, double_quant=True)}
    ),
    "only rules": QuantizationConfig(rules={"blocks.0": "fp4"}),
}
MAPS = {
    "one device": "cpu",
    "two places": {"": "cpu", "blocks.1": "disk"},
    "automatic": "auto",
}


def assert_as_planned(plan, model):
    """Every row of `plan` is what became of that tensor of the loaded `model`, and of nothing else."""
    tree = ModelTree(model)
    held, first = {}, {name: row.name for row in plan.tensors for name in row.names}
    for group in tree.tensors:
        owner, leaf = find_owner(tree.modules, group.names[0])
        weight = owner.weight_of(leaf) if isinstance(owner, QuantizedModule) else None
        if isinstance(owner, QuantizedModule) and leaf in owner.state_spec() and weight is None:
            weight = next(iter(owner.descriptions))  # quant_state
        name = group.names[0] if weight is None else f"{group.names[0].removesuffix(leaf)}{weight}"
        held.setdefault(first[name], []).append(group)
    assert held.keys() == {row.name for row in plan.tensors}
    for row in plan.tensors:
        groups = held[row.name]
        assert sum(nbytes_of(group.tensor) for group in groups) == row.nbytes, row
        owner, leaf = find_owner(tree.modules, row.name)
        if row.is_quantized:
            description = owner.descriptions[leaf]
            settings = description.format.describe()
            assert {"format": row.format, **row.settings} == settings, row
            assert description.weight_shape == row.shape
        else:
            ((names, tensor, is_buffer, _),) = groups
            assert (names, tuple(tensor.shape)) == (row.names, row.shape)
            assert (dtype_name(tensor.dtype), is_buffer) == (row.format, row.is_buffer), row
    assert plan.nbytes == bigq.memory_footprint(model).nbytes
    report = {module.name: module for module in model.quantization_report.modules}
    for name, module in report.items():
        rows = [row for row in plan.tensors if row.name.rpartition(".")[0] == name]
        assert sum(row.nbytes for row in rows) == module.nbytes
        assert {row.device for row in rows} == set(module.device.split(" and "))
        quantized = [row for row in rows if row.is_quantized]
        for row in quantized or [row for row in rows if not row.is_buffer and len(row.shape) > 1]:
            assert module.rule in (row.why, "no weight to quantize", "quantized"), row
    assert dict(plan.device_map) == getattr(model, "hf_device_map", plan.device_map)


@pytest.mark.parametrize("place", MAPS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_load_does_what_the_plan_says(name, place, tiny, empty, checkpoint, tmp_path):
    config, device_map = CONFIGS[name], MAPS[place]
    limits = {"max_memory": {"cpu": "90KB"}, "offload_folder": tmp_path} if device_map == "auto" else {}
    model = empty(tiny)
    before = {name: (id(p), p.device) for name, p in model.named_parameters()}
    plan = bigq.plan(model, config, device_map, weights_location=checkpoint, **limits)
    assert {name: (id(p), p.device) for name, p in model.named_parameters()} == before
    assert not hasattr(model, "quantization_report")
    assert_as_planned(plan, bigq.load_and_quantize_model(model, checkpoint, config, device_map, **limits))


GPU_MAPS = {
    "the GPU": None,
    "a block on the CPU": {"": 0, "blocks.1": "cpu"},
    "a block on the disk": {"": 0, "blocks.0": "disk"},
    "automatic": "auto",
}


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["preserve", "quantized"])
@pytest.mark.parametrize("place", GPU_MAPS)
def test_the_load_does_what_the_plan_says_on_a_gpu(place, offload, tiny, empty, checkpoint, tmp_path):
    limits = {"max_memory": {0: "60KB", "cpu": "1GB"}} if GPU_MAPS[place] == "auto" else {}
    arguments = {"device_map": GPU_MAPS[place], "offload": offload, "offload_folder": tmp_path, **limits}
    config = CONFIGS["nf4" if limits else "rules"]
    plan = bigq.plan(empty(tiny), config, weights_location=checkpoint, **arguments)
    assert "cuda:0" in plan.nbytes or (limits and offload == "preserve")  # two float blocks do not fit on it
    assert_as_planned(plan, bigq.load_and_quantize_model(empty(tiny), checkpoint, config, **arguments))


@pytest.mark.parametrize("offload", ["preserve", "quantized", torch.float32], ids=str)
def test_how_offloaded_weights_are_stored(offload, tiny, empty, checkpoint):
    device_map = {"": "cpu", "blocks": "disk"}
    arguments = {"quantization_config": CONFIGS["nf4"], "device_map": device_map, "offload": offload}
    plan = bigq.plan(empty(tiny), weights_location=checkpoint, **arguments)
    assert_as_planned(plan, bigq.load_and_quantize_model(empty(tiny), checkpoint, **arguments))


def test_a_model_with_weights(tiny):
    model = tiny(tied=True).half()
    plan = bigq.plan(model, CONFIGS["nf4"], "cpu")
    assert {row.source_dtype for row in plan.tensors if not row.is_buffer} == {"float16"}
    assert_as_planned(plan, bigq.load_and_quantize_model(model, None, CONFIGS["nf4"], "cpu"))


def test_without_weights_the_dtypes_are_those_of_the_model():
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    plan = bigq.plan(model, "nf4", "cpu")
    assert [(row.name, row.source_dtype, row.format, row.nbytes_before) for row in plan.tensors] == [
        ("0.weight", "bfloat16", "nf4", 8192),
        ("0.bias", "bfloat16", "bfloat16", 128),
        ("1.weight", "bfloat16", "bfloat16", 8192),
        ("1.bias", "bfloat16", "bfloat16", 128),
    ]
    assert plan.tensors[0].nbytes == 64 * 32 + 64 * 4 + 256  # codes, a scale of 4 bytes for 64 weights, the description
    assert (plan.parameters, plan.quantized_share) == (2 * 64 * 65, 64 * 64 / (2 * 64 * 65))
    assert plan.nbytes == {"cpu": {"packed": 2048, "scales": 512, "kept": 128 + 8192 + 128}}


@pytest.mark.parametrize("layout", ["bigq", "bitsandbytes"])
def test_a_checkpoint_that_is_quantized(layout, tiny, empty, tmp_path):
    model = bigq.load_and_quantize_model(tiny(64), None, QuantizationConfig("nf4", double_quant=True), "cpu")
    bigq.save_quantized(model, tmp_path / "saved", layout=layout)
    plan = bigq.plan(empty(tiny, width=64), weights_location=tmp_path / "saved", device_map="cpu")
    loaded = bigq.load_and_quantize_model(empty(tiny, width=64), tmp_path / "saved", None, "cpu")
    assert_as_planned(plan, loaded)
    assert any(row.source_dtype == row.format == "nf4" for row in plan.tensors)


def test_a_loaded_model_is_left_as_it_is(tiny, ids, empty, checkpoint):
    model = bigq.load_and_quantize_model(empty(tiny), checkpoint, CONFIGS["nf4"], {"": "cpu", "blocks.0": "disk"})
    before = model(ids)
    plan = bigq.plan(model, CONFIGS["rules"], "cpu", weights_location=checkpoint)
    assert torch.equal(model(ids), before)
    with pytest.raises(UnsupportedError, match="quantized already"):
        bigq.plan(model, CONFIGS["rules"], "cpu")
    assert_as_planned(plan, bigq.load_and_quantize_model(model, checkpoint, CONFIGS["rules"], "cpu"))


def test_it_refuses_what_the_load_refuses(tiny, empty, checkpoint, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    for location, config, device_map, error in [
        (tmp_path / "other.safetensors", CONFIGS["nf4"], "cpu", CheckpointError),
        (checkpoint, QuantizationConfig("nf4", rules={"hed": "int8"}), "cpu", ConfigError),
        (checkpoint, CONFIGS["nf4"], {"": 97}, PlacementError),
        (checkpoint, None, "cpu", ConfigError),
    ]:
        with pytest.raises(error) as planned:
            bigq.plan(empty(tiny), config, device_map, weights_location=location)
        with pytest.raises(error) as loaded:
            bigq.load_and_quantize_model(empty(tiny), location, config, device_map)
        assert str(planned.value) == str(loaded.value)
    with pytest.raises(ConfigError, match="first argument is the config 'nf4'"):
        bigq.plan("nf4", empty(tiny))


def test_a_plan_for_another_machine(tiny, empty, checkpoint):
    limits = {0: "60KB", "cpu": "10MB"}
    plan = bigq.plan(empty(tiny), "nf4", "auto", weights_location=checkpoint, max_memory=limits, other_machine=True)
    assert plan.nbytes.keys() == {"cuda:0", "cpu"}
    assert plan.runs_on == "cuda:0"
    on_gpu = sum(plan.nbytes["cuda:0"].values()) + plan.copies_nbytes["cuda:0"]
    assert 0 < on_gpu <= 60_000
    assert plan.total_nbytes == bigq.plan(empty(tiny), "nf4", "cpu", weights_location=checkpoint).total_nbytes
    split = {"": 1, "blocks.0": 0}
    two = bigq.plan(empty(tiny), "nf4", split, weights_location=checkpoint, other_machine=True)
    assert two.device_map == split
    with pytest.raises(PlacementError, match="does not fit"):
        bigq.plan(empty(tiny), "nf4", "auto", weights_location=checkpoint, max_memory={0: 100}, other_machine=True)


def test_the_table_folds_what_is_alike(tiny, empty, checkpoint):
    plan = bigq.plan(empty(tiny), CONFIGS["rules"], MAPS["two places"], weights_location=checkpoint)
    table = plan.table(80)
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    titles = {line.rstrip(":") for line in lines if line.endswith(":")}
    assert titles == {row.why for row in plan.tensors}
    counted = [line.split() for line in lines if line.startswith("  ")]
    assert sum(int(cells[1] if cells[1] != "(tied)" else cells[2]) for cells in counted) == len(plan.tensors)
    assert "nf4 b32 dq" in table
    assert len(plan.table(200).splitlines()) == len(lines)
    said = json.loads(json.dumps(plan.to_dict()))
    assert said["nbytes"] == plan.nbytes
    assert [row["why"] for row in said["tensors"]] == [row.why for row in plan.tensors]
    assert set(KINDS) == set(said["nbytes"]["cpu"])


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, **SMALL, "num_key_value_heads": 2, "dtype": "bfloat16"}
FAMILIES = {
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}, {"embed_tokens": "int8"}),
    "experts that are merged": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 3}, {}),
    "transposed": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}, {}),
    "float32 by its class": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dtype": "float16"},
        {},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.17")
    from bigq.integrations.skeleton import build_skeleton

    name, kind, settings, rules = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    getattr(transformers, name)(config).to(config.dtype or torch.float32).save_pretrained(tmp_path)
    asked = QuantizationConfig("nf4", rules=rules)
    plan = bigq.plan(tmp_path, asked, "cpu")
    assert_as_planned(plan, bigq.load_and_quantize_model(build_skeleton(tmp_path), tmp_path, asked, "cpu"))
    assert 0.3 < plan.quantized_share <= 1
    assert plan.nbytes_before > plan.total_nbytes
