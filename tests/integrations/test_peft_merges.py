"""Merging adapters of PEFT into quantized weights, and unmerging them."""

import copy

import pytest
import torch
from accelerate import Accelerator, init_empty_weights

from bigq import (
    NF4,
    Int8,
    QuantizationConfig,
    QuantizedLinear,
    QuantizedModule,
    dequantize_tensor,
    load_and_quantize_model,
    quantize_tensor,
)

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from adapted import distance, float_twin, logits, moved, quantized, state, tuned  # noqa: E402  # it imports peft
from tuners import LORAS, OTHERS, llama, lora  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        "`is_gradient_checkpointing` is deprecated",
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor to 1",
        "Sparse invariant checks are implicitly disabled",
        "Unmerge result can be inaccurate for",  # not here
        "`lora_bias=True` was passed but the targeted layer",
        "Detected that the base layer has no bias term",
        "Already following adapters were merged",
    )
]
REFUSED = {
    "alora": "aLoRA does not support",
    "beft": "Base layer has no bias",
    "lily": "not supported for Lily",
    "lora_bias": "base layer has no bias",
    "shadow": "cannot be merged",
}
CANNOT_MERGE = {*REFUSED, "poly", "lora_replication"}  # Poly's error has no words, and replicas share a weight
CANNOT_UNMERGE = {"osf"}
NO_WEIGHTS = {"ln_tuning", "trainable_tokens"}  # nothing that is quantized
MERGED = [name for name in LORAS | OTHERS if name not in CANNOT_MERGE | NO_WEIGHTS]


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


def requantized(weight, weight_format):
    return dequantize_tensor(quantize_tensor(weight, weight_format))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("name", MERGED)
def test_a_merge_quantizes_the_sum_and_an_unmerge_leaves_no_trace(name, weight_format):
    config = (LORAS | OTHERS)[name]
    model = moved(tuned(quantized(weight_format), config()), by=0.1)
    twin = float_twin(model, config(), weight_format)
    before, expected = state(model), logits(model, name)
    model.merge_adapter()
    twin.merge_adapter()
    # OFT multiplies a matrix by the weight, and a product with int8 rounds both.
    budget = 0.02 if (name, weight_format) == ("oft", Int8()) else 1e-6
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            merged = twin.get_submodule(path).weight.detach()
            assert distance(module.dequantize(), requantized(merged, weight_format)) <= budget, path
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    if name in CANNOT_UNMERGE:
        with pytest.raises(NotImplementedError, match="unmerging"):
            model.unmerge_adapter()
        return
    model.unmerge_adapter()
    assert_same(state(model), before)
    if name == "lora_embedding_and_head":  # of which the embedding and the head are floats, and rounded
        assert distance(logits(model, name), expected) < 1e-5
    else:
        assert torch.equal(logits(model, name), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_in_words(name):
    model = moved(tuned(quantized(NF4()), (LORAS | OTHERS)[name]()))
    before = state(model)
    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match=REFUSED[name]):
        model.merge_adapter()
    assert_same(state(model), before)


@pytest.mark.parametrize("config", ["lora", "dora"])
def test_adapters_that_are_merged_one_after_the_other_are_unmerged_together(config, weight_format):
    model = moved(tuned(quantized(weight_format), LORAS[config]()))
    model.add_adapter("second", LORAS[config](), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "second"])
    moved(model, by=0.05)
    before = state(model)
    model.merge_adapter(["default"])
    first = state(model)
    model.merge_adapter(["second"])
    assert all(not torch.equal(first[name], state(model)[name]) for name in first if "v_proj.weight_packed" in name)
    model.unmerge_adapter()
    assert_same(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["lora", "dora", "oft", "ia3"])
def test_a_half_precision_model_keeps_its_dtype(name, dtype, weight_format):
    base = load_and_quantize_model(llama().to(dtype), None, QuantizationConfig(weight_format), "cpu")
    model = moved(tuned(base, (LORAS | OTHERS)[name]()), by=0.1)
    before, expected = state(model), logits(model, name)
    model.merge_adapter()
    assert distance(logits(model, name).float(), expected.float()) < 0.5
    model.unmerge_adapter()
    assert_same(state(model), before)
    assert torch.equal(logits(model, name), expected)
    assert {module.weight.dtype for module in model.modules() if isinstance(module, QuantizedModule)} == {dtype}


def test_merge_and_unload_leaves_quantized_modules_and_keeps_no_codes(weight_format):
    model = moved(tuned(quantized(weight_format), lora()))
    expected = state(model)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    unloaded = model.merge_and_unload()
    assert_same(state(unloaded), state(merged))
    assert {type(layer.self_attn.v_proj) for layer in unloaded.model.layers} == {QuantizedLinear}
    assert not any("base_layer" in name for name, _ in unloaded.named_modules())
    assert_same(state(merged.unload()), state(merged))
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in state(unloaded).items())


def test_an_adapter_that_is_not_merged_unloads_without_a_trace(weight_format):
    before = state(quantized(weight_format))
    assert_same(state(moved(tuned(quantized(weight_format), lora())).unload()), before)


def test_a_merged_model_saves_and_loads_again(weight_format, tmp_path):
    model = moved(tuned(quantized(weight_format), lora())).merge_and_unload()
    Accelerator().save_model(model, tmp_path)
    with init_empty_weights():
        skeleton = llama()
    again = load_and_quantize_model(skeleton, tmp_path, device_map="cpu")
    assert torch.equal(logits(again), logits(model))
