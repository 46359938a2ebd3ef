"""Estimates beside what models then take: bytes of weights, of caches and of adapters are those of the tensors."""

import json
from math import prod

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bigq
from bigq import ConfigError, QuantizationConfig
from bigq.dry_run.estimate import estimate_memory
from bigq.dry_run.kv_cache import Unknown, measure_cache
from bigq.dry_run.run_memory import RunMemory
from bigq.integrations.skeleton import build_skeleton

transformers = pytest.importorskip("transformers", minversion="5.17")

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
HEADS = {"head_dim": 16}
RANKS = {"q_lora_rank": 16, "kv_lora_rank": 24}
LATENT = {"num_key_value_heads": 4, **RANKS, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 8, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
FAMILIES = {
    "grouped queries": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "sliding windows": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 6}),
    "some windows": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "head_dim": 16, "sliding_window": 6}),
    "fused queries": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 64, "n_head": 4, "n_layer": 2}),
    "experts": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 3}),
    "latent keys": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**TEXT, **LATENT, **EXPERTS}),
    "states": ("Mamba2ForCausalLM", "Mamba2Config", {"vocab_size": 64, "hidden_size": 64, "num_heads": 8, **HEADS}),
}


def build(name, kind, settings, **options):
    config = getattr(transformers, kind)(**{"num_hidden_layers": 2} | settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a small Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    build(*FAMILIES["grouped queries"]).save_pretrained(folder)
    return folder


def stored_nbytes(cache):
    """Bytes of the memory that a cache keeps alive."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            for tensor in held:
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_that_of_the_running_model(family):
    model = build(*FAMILIES[family])
    layers = measure_cache(model, torch.bfloat16)
    with torch.no_grad():
        made = model(input_ids=torch.zeros(2, 20, dtype=torch.long), use_cache=True)
        cache = made.cache_params if "cache_params" in made else made.past_key_values
        assert stored_nbytes(cache) == 2 * sum(layer.prompt_nbytes(20) for layer in layers)
        name = "cache_params" if "cache_params" in made else "past_key_values"
        model(input_ids=torch.zeros(2, 1, dtype=torch.long), use_cache=True, **{name: cache})
    assert stored_nbytes(cache) == 2 * sum(layer.nbytes(21) for layer in layers)
    assert next(model.parameters()).device.type == "cpu"


def test_caches_that_are_unknown_say_why(tiny):
    t5 = transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    for model, words in {
        transformers.T5ForConditionalGeneration(t5): "encoder-decoder",
        tiny(): "only models of transformers",
    }.items():
        found = measure_cache(model, torch.float32)
        assert isinstance(found, Unknown)
        assert words in found.reason
    assert measure_cache(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)), torch.float32) == []


def amounts(found):
    return {(item.name, item.device): item.nbytes for item in found.items}


def test_weights_and_cache(llama):
    found = estimate_memory(llama, "nf4", context=100, batch=3)
    model = bigq.load_and_quantize_model(build_skeleton(llama), llama, QuantizationConfig("nf4"), "cpu")
    said = amounts(found)
    assert said["weights", "cuda:0"] == bigq.memory_footprint(model).total_nbytes
    # sequences, tokens, layers, keys and values, heads, numbers, bytes
    assert said["KV cache", "cuda:0"] == 3 * 100 * 3 * 2 * 2 * 16 * 2
    width = (192 + 192 + 64) + 192  # outputs of the MLP's linears, and the widest once more
    assert said["activations", "cuda:0"] == 300 * (4 * 64 + width) * 2
    assert said["logits", "cuda:0"] == 3 * 128 * (2 + 4)
    assert said["decoded weight", "cuda:0"] == 192 * 64 * 2
    assert said["weights being read", "cuda:0"] == found.plan.nbytes_before  # less than the budget
    assert found.phases == ("load", "generate")
    needed, is_all = found.needed("cuda:0", "generate")
    assert is_all
    on_gpu = sum(nbytes for (_, device), nbytes in said.items() if device == "cuda:0")
    assert needed == on_gpu - said["weights being read", "cuda:0"]
    json.dumps(found.to_dict())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_qlora_has_the_adapters_of_peft(llama):
    peft = pytest.importorskip("peft")
    found = estimate_memory(llama, "nf4", train="qlora", rank=4, context=10)
    model = bigq.load_and_quantize_model(build_skeleton(llama), llama, QuantizationConfig("nf4"), "cpu")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    count, said = sum(parameter.numel() for parameter in trained), amounts(found)
    assert said["adapters", "cuda:0"] == said["gradients", "cuda:0"] == 4 * count
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert said["optimizer", "cuda:0"] == sum(state.nbytes for state in states)
    block = 2 * (64 + 32 + 32 + 64 + 192 + 192 + 64) + 3 * 192
    assert said["activations", "cuda:0"] == 3 * 10 * 64 * 2 + max(10 * (12 * 64 + block) * 2, 10 * 128 * 12)
    assert found.phases == ("load", "train")
    assert "KV cache" not in {name for name, _ in said}


def test_an_automatic_map_leaves_room_for_the_rest(llama):
    whole = estimate_memory(llama, "nf4", context=100)
    weights = sum(whole.plan.nbytes["cuda:0"].values())
    limit = max(whole.needed("cuda:0", phase)[0] for phase in whole.phases) - weights // 5
    found = estimate_memory(llama, "nf4", context=100, max_memory={0: limit, "cpu": "1GB"})
    assert found.fits is True
    assert found.plan.nbytes.keys() == {"cuda:0", "cpu"}
    assert found.plan.copies_nbytes["cuda:0"] > 0
    for phase in found.phases:
        assert found.needed("cuda:0", phase)[0] <= limit
    again = bigq.plan(llama, "nf4", "auto", max_memory=found.max_memory, other_machine=True)
    assert again == found.plan
    assert f"max_memory={dict(found.max_memory)}" in found.verdict()
    tight = estimate_memory(llama, "nf4", context=100, max_memory={0: "10KB"})
    assert tight.fits is False
    assert "does not fit" in tight.verdict()
    assert estimate_memory(llama, "nf4", {"": 0}, context=10**7, max_memory={0: "1GiB"}).fits is False


def test_several_gpus_hold_the_cache_of_their_blocks(llama):
    device_map = {"": 0, "model.layers.2": 1}
    found = estimate_memory(llama, "nf4", device_map, context=100, max_memory={0: "1GB", 1: "1GB"})
    said = amounts(found)
    assert said["KV cache", "cuda:0"] == 2 * said["KV cache", "cuda:1"]
    assert found.fits is True


def test_what_is_unknown_is_said(tmp_path, llama):
    name, kind, settings = FAMILIES["experts"]
    build(name, kind, settings).save_pretrained(tmp_path)
    found = estimate_memory(tmp_path, "nf4", max_memory={0: "10GB"})
    assert amounts(found)["decoded weight", "cuda:0"] == 2 * 192 * 64 * 2  # of one expert, in bfloat16
    assert found.fits is True
    t5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)).save_pretrained(tmp_path)
    found = estimate_memory(tmp_path, "int8", max_memory={0: "10GB"})
    assert {item.name for item in found.items if item.nbytes is None} == {"KV cache", "activations"}
    assert ("decoded weight", "cuda:0") not in amounts(found)
    assert found.fits is None
    assert not found.needed("cuda:0", "generate")[1]
    assert "an item is unknown" in found.verdict()
    assert "unknown" in found.table()
    assert estimate_memory(tmp_path, "nf4", {"": 0}, max_memory={0: 1000}).fits is False
    if not torch.cuda.is_available():
        without = estimate_memory(llama, "nf4")
        assert without.fits is None
        assert "pass max_memory" in without.verdict()


def test_windows_show_what_the_prompt_takes(tmp_path):
    build(*FAMILIES["sliding windows"]).save_pretrained(tmp_path)
    said = amounts(estimate_memory(tmp_path, "nf4", context=50))
    token = 3 * 2 * 2 * 16 * 2
    assert said["KV cache", "cuda:0"] == 6 * token
    assert said["KV cache of the prompt", "cuda:0"] == (50 - 6) * token


def test_a_quantized_folder_needs_no_config(llama, tmp_path):
    model = bigq.load_and_quantize_model(build_skeleton(llama), llama, QuantizationConfig("int8"), "cpu")
    bigq.save_quantized(model, tmp_path)
    said = amounts(estimate_memory(tmp_path, device_map="cpu"))
    assert said["weights", "cpu"] == bigq.memory_footprint(model).total_nbytes
    assert prod(model.lm_head.weight.shape) == 128 * 64


def test_refusals(llama):
    for arguments, words in [
        ({"context": 0}, "context is 0"),
        ({"train": "full"}, "train is 'full'; expected one of"),
        ({"rank": -1}, "rank is -1"),
    ]:
        with pytest.raises(ConfigError, match=words):
            estimate_memory(llama, "nf4", **arguments)


def test_activations_that_no_formula_says():
    bart = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 16}
    narrow = {f"{part}_{name}": 4 for part in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    image = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    for model, words in {
        transformers.ViTModel(transformers.ViTConfig(**image)): "its input is no text",
        transformers.BartModel(transformers.BartConfig(**bart, **narrow)): "an encoder and a decoder run",
        build(*FAMILIES["states"]): "its layers keep states",
        build(*FAMILIES["fused queries"], attn_implementation="eager"): "keeps the scores",
    }.items():
        plan = bigq.plan(model, "nf4", "cpu")
        run = RunMemory(model, plan, batch=1, context=8)
        for items in (run.generate(plan), run.train(plan, 2)):
            (activations,) = [item for item in items if item.name == "activations"]
            assert activations.nbytes is None
            assert words in activations.how


def test_a_model_that_does_not_generate_has_logits_of_every_token():
    config = transformers.BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.BertForMaskedLM(config)
    plan = bigq.plan(model, "nf4", "cpu")
    said = {item.name: item.nbytes for item in RunMemory(model, plan, batch=2, context=8).generate(plan)}
    assert said["logits"] == 2 * 8 * 100 * (4 + 4)
    assert "KV cache" not in said


def peak_nbytes(call, folder):
    """The most bytes that `call` holds at a time on the CPU beside what there was, by torch's profiler."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held = [event for event in events if event.get("name") == "[memory]"]
    held.sort(key=lambda event: event["ts"])
    before = held[0]["args"]["Total Allocated"] - held[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in held) - before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocabulary", [64, 2000], ids=["small head", "large head"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3"])
def test_activations_are_near_what_is_measured(family, vocabulary, tmp_path):
    """With float weights: what decoding a weight takes is an item of its own."""
    peft = pytest.importorskip("peft")
    settings = {**TEXT, "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 384, "pad_token_id": 0}
    settings |= {"head_dim": 32} if family == "Qwen3" else {}
    model = build(f"{family}ForCausalLM", f"{family}Config", settings)
    ids, plan = torch.zeros(1, 1024, dtype=torch.long), bigq.plan(model, "nf4", "cpu")
    run = RunMemory(model, plan, batch=1, context=1024)
    said = {item.name: item.nbytes for item in run.generate(plan)}
    with torch.no_grad():
        peak = peak_nbytes(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), tmp_path)
    assert 0.95 < said["activations"] / (peak - said["KV cache"]) < 1.05
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        adapted.zero_grad()

    said = {item.name: item.nbytes for item in run.train(plan, 8)}
    assert 0.9 < (said["activations"] + said["gradients"]) / peak_nbytes(step, tmp_path) < 1.15
