"""transformers models, also under PEFT, with tiny random weights: the structures that trip a quantizer."""

import copy
import pickle
import weakref

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from safetensors.torch import save_file
from torch import nn

from bigq import QuantizationConfig, QuantizedLinear, QuantizedModule, load_and_quantize_model, num_parameters
from bigq.loading.batch_quantizer import BatchQuantizer

transformers = pytest.importorskip("transformers")
NF4 = QuantizationConfig("nf4")
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, 8),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 8),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "intermediate_size": 48, "tie_word_embeddings": False}, 14),
    "llama-tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**SMALL, "intermediate_size": 48, "tie_word_embeddings": True},
        14,
    ),
    "bert": ("BertModel", "BertConfig", {**SMALL, "intermediate_size": 48}, 13),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        28,
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SMALL, "intermediate_size": 48, "image_size": 32, "patch_size": 8},
        12,
    ),
}
del MODELS["vit"][2]["vocab_size"]


def build(name):
    kind, config, arguments, _ = MODELS[name]
    return getattr(transformers, kind)(getattr(transformers, config)(**arguments)).eval()


def run(model, name):
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 9))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_loads_runs_and_comes_back(name, format_name, tmp_path):
    plain = build(name)
    (tmp_path / "plain").mkdir()
    save_file({key: t.clone() for key, t in plain.state_dict().items()}, tmp_path / "plain" / "model.safetensors")
    with init_empty_weights():
        skeleton = build(name)
    skeleton.tie_weights()
    model = load_and_quantize_model(skeleton, tmp_path / "plain", QuantizationConfig(format_name), "cpu")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedModule)}
    assert len(layers) == MODELS[name][3]
    for path, layer in layers.items():
        target = plain.get_submodule(path)
        assert isinstance(layer, type(target))
        assert layer.weight.shape == target.weight.shape
        target.weight.data = layer.dequantize()
    expected = run(plain, name)
    assert (run(model, name) - expected).norm() <= (0.02 if format_name == "int8" else 1e-4) * expected.norm()
    head = model.get_output_embeddings()
    assert head is None or type(head) is nn.Linear
    Accelerator().save_model(model, tmp_path / "saved")
    with init_empty_weights():
        skeleton = build(name)
    skeleton.tie_weights()
    again = load_and_quantize_model(skeleton, tmp_path / "saved", device_map="cpu")
    assert torch.equal(run(again, name), run(model, name))


def test_a_conv1d_that_is_named_is_quantized_as_the_others_are(tmp_path):
    """Square, so that its input would also fit a weight that is the wrong way round."""
    conv1d = transformers.pytorch_utils.Conv1D
    plain = nn.Sequential(conv1d(32, 32), nn.ReLU(), conv1d(32, 32)).eval()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    config = QuantizationConfig("nf4", also_quantize=["2"])  # by default it is the output head
    with init_empty_weights():
        skeleton = nn.Sequential(conv1d(32, 32), nn.ReLU(), conv1d(32, 32)).eval()
    model = load_and_quantize_model(skeleton, tmp_path, config, "cpu")
    assert all(isinstance(model[i], QuantizedModule) for i in (0, 2))
    for i in (0, 2):
        assert (model[i].dequantize() - plain[i].weight).norm() < 0.15 * plain[i].weight.norm()
        plain[i].weight.data = model[i].dequantize()
    x = torch.randn(5, 32)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_num_parameters_of_a_transformers_model_counts_weights(name, tmp_path):
    plain = build(name)
    save_file({key: t.clone() for key, t in plain.state_dict().items()}, tmp_path / "model.safetensors")
    with init_empty_weights():
        skeleton = build(name)
    skeleton.tie_weights()
    model = load_and_quantize_model(skeleton, tmp_path, NF4, "cpu")
    assert model.num_parameters() == num_parameters(model) == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    frozen = sum(layer.dequantize().numel() for layer in model.modules() if isinstance(layer, QuantizedModule))
    assert model.num_parameters(only_trainable=True) == plain.num_parameters() - frozen
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.num_parameters() == plain.num_parameters()


def test_a_kv_cache_grows_right_through_offloaded_blocks(tmp_path):
    build("llama").save_pretrained(tmp_path / "plain")
    with init_empty_weights():
        skeletons = [build("llama") for _ in range(2)]
    resident = load_and_quantize_model(skeletons[0], tmp_path / "plain", NF4, "cpu")
    offloaded = load_and_quantize_model(
        skeletons[1],
        tmp_path / "plain",
        NF4,
        {"": "cpu", "model.layers.1": "disk"},
        offload="quantized",
        offload_folder=tmp_path / "offload",
    )
    ids = torch.arange(5)[None]
    tokens = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (resident, offloaded)
    ]
    assert torch.equal(*tokens)


def test_bitsandbytes_config_and_no_split_modules(tmp_path):
    build("llama").save_pretrained(tmp_path / "plain")
    with init_empty_weights():
        skeleton = build("llama")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = load_and_quantize_model(
        skeleton, tmp_path / "plain", config, "auto", max_memory={"cpu": 30_000}, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert "model.layers.0" in model.hf_device_map
    assert run(model, "llama").isfinite().all()


def test_old_checkpoints_with_ignorable_extras(tmp_path):
    """GPT-2 files carry causal masks that today's model computes; the model itself says to ignore them."""
    plain = build("gpt2")
    state = {name: t.clone() for name, t in plain.state_dict().items() if name != "lm_head.weight"}
    state |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(state, tmp_path / "model.safetensors")
    with init_empty_weights():
        skeleton = build("gpt2")
    skeleton.tie_weights()
    skeleton._keys_to_ignore_on_load_unexpected = [r"h\.\d+\.attn\.masked_bias"]
    load_and_quantize_model(skeleton, tmp_path, NF4, "cpu")
    attention = skeleton.transformer.h[0].attn
    assert isinstance(attention.c_attn, QuantizedModule)
    assert isinstance(attention.c_attn, type(plain.transformer.h[0].attn.c_attn))
    assert not isinstance(attention.c_attn, QuantizedLinear)
    assert attention.c_attn.weight.shape == attention.c_attn.dequantize().shape == (32, 96)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_peft_trains_adapters_on_it(use_dora, tmp_path):
    peft = pytest.importorskip("peft")
    build("llama").save_pretrained(tmp_path / "plain")
    with init_empty_weights():
        skeleton = build("llama")
    model = load_and_quantize_model(skeleton, tmp_path / "plain", NF4, "cpu")
    frozen = {name: t.clone() for name, t in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), config)
    ids = torch.arange(24).view(2, 12)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in tuned.state_dict().items():
        original = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if original in frozen and tensor.dtype in (torch.uint8, torch.int8):
            assert torch.equal(tensor, frozen[original])


@pytest.mark.parametrize("said", [None, torch.float16], ids=str)
def test_flash_attention_gets_the_dtype_of_the_model_from_float32(said):
    """transformers asks the config of a quantized model for it, which has none if the model was built without."""
    get_target_dtype = pytest.importorskip("transformers.integrations.flash_attention").get_target_dtype
    model = build("llama").to(torch.bfloat16)
    model.config.dtype = said
    own = model.config
    load_and_quantize_model(model, None, NF4, "cpu")
    attention = model.model.layers[0].self_attn
    assert get_target_dtype(torch.zeros(1), attention) == (said or torch.bfloat16)
    assert own.dtype == said


def test_in_place_frees_each_weight_before_the_next_is_quantized(monkeypatch):
    model, alive = build("llama"), []
    weights = [weakref.ref(module.weight) for module in model.model.layers.modules() if type(module) is nn.Linear]
    quantize = BatchQuantizer.quantize

    def counting(self, items):
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(self, items)

    monkeypatch.setattr(BatchQuantizer, "quantize", counting)
    load_and_quantize_model(model, None, NF4, "cpu")
    assert alive == [*range(14, 0, -1)]
