"""Recipes for bitsandbytes, with no line more than their authors wrote, run on bigq after `use_as_bitsandbytes()`."""

import pytest
import torch
from torch import nn

import bigq
from bigq import NF4, Int8, QuantizedLinear

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig  # noqa: E402
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # noqa: E402

import bigq.integrations.transformers as integration  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter"),
]
IDS = torch.arange(4, 13)[None]


@pytest.fixture(autouse=True)
def _in_place_of_bitsandbytes(monkeypatch):
    for name in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, name, AUTO_QUANTIZER_MAPPING[name])
    integration.use_as_bitsandbytes()


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=64
    )
    path = tmp_path_factory.mktemp("opt")
    transformers.OPTForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bloom")
    config = transformers.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4)
    transformers.BloomForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def flan_t5(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=64,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(
    scope="module",
    params=[
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    ],
    ids=["int8", "4-bit", "4-bit-as-bfloat16"],
)
def repository(request, opt, tmp_path_factory):
    """A folder that transformers has saved with bitsandbytes, and the bits of one weight."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**request.param, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(opt, quantization_config=config, device_map="cpu")
    path = tmp_path_factory.mktemp("repository")
    model.save_pretrained(path, save_original_format=False)
    codes = model.model.decoder.layers[0].fc1.weight.detach()
    return path, codes if codes.dtype == torch.int8 else codes.view(torch.uint8)


def formats(model):
    return {type(module.format) for module in model.modules() if isinstance(module, QuantizedLinear)}


def test_opt_in_4_bits(opt):
    nf4_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    double_quant_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4"
    )
    plain = AutoModelForCausalLM.from_pretrained(opt)
    model = AutoModelForCausalLM.from_pretrained(opt, device_map="auto", quantization_config=nf4_config)
    double = AutoModelForCausalLM.from_pretrained(opt, device_map="auto", quantization_config=double_quant_config)
    assert formats(model) == {NF4}
    assert double.model.decoder.layers[0].fc1.format == NF4(double_quant=True)
    assert double.get_memory_footprint() < model.get_memory_footprint() < plain.get_memory_footprint()
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=1).shape[1] <= 12


def test_qlora(opt, tmp_path):
    peft = pytest.importorskip("peft")
    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(opt, quantization_config=bnb_config, device_map="auto")
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    model.eval()
    base = AutoModelForCausalLM.from_pretrained(opt, quantization_config=bnb_config, device_map="auto")
    again = peft.PeftModel.from_pretrained(peft.prepare_model_for_kbit_training(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_bloom_in_int8_with_a_map_and_float32_on_the_cpu(bloom):
    quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    device_map = {
        "transformer.word_embeddings": "cpu",
        "transformer.word_embeddings_layernorm": "cpu",
        "lm_head": "cpu",
        "transformer.h": "cpu",
        "transformer.ln_f": "cpu",
    }
    model_8bit = AutoModelForCausalLM.from_pretrained(
        bloom, device_map=device_map, quantization_config=quantization_config
    )
    assert formats(model_8bit) == {Int8}
    assert model_8bit(IDS).logits.isfinite().all()


@pytest.mark.gpu
def test_bloom_in_int8_with_float32_on_the_cpu_beside_a_gpu(bloom):
    quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    device_map = {
        "transformer.word_embeddings": 0,
        "transformer.word_embeddings_layernorm": 0,
        "lm_head": 0,
        "transformer.h.0": "cpu",
        "transformer.h.1": 0,
        "transformer.ln_f": 0,
    }
    model_8bit = AutoModelForCausalLM.from_pretrained(
        bloom, device_map=device_map, quantization_config=quantization_config
    )
    kept, quantized = (block.mlp.dense_h_to_4h for block in model_8bit.transformer.h)
    assert (type(kept), kept.weight.dtype, kept.weight.device.type) == (nn.Linear, torch.float32, "cpu")
    assert quantized.weight_packed.device.type == "cuda"
    assert model_8bit.hf_device_map == device_map
    assert model_8bit(IDS.cuda()).logits.isfinite().all()


def test_bloom_threshold_and_skipped_modules(bloom):
    quantization_config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=10.0, llm_int8_skip_modules=["lm_head", "query_key_value"]
    )
    model_8bit = AutoModelForCausalLM.from_pretrained(bloom, device_map="auto", quantization_config=quantization_config)
    block = model_8bit.transformer.h[0]
    assert block.mlp.dense_h_to_4h.format == Int8(threshold=10.0)
    assert type(block.self_attention.query_key_value) is nn.Linear


def test_bloom_saved_and_loaded_again(bloom, tmp_path):
    quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(bloom, quantization_config=quantization_config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("placement", ["auto", "cpu", {"": "cpu", "model.decoder.layers.1": "disk"}], ids=str)
def test_a_repository_of_theirs_loads_with_the_same_bits(repository, tmp_path, placement):
    folder, codes = repository
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=placement, offload_folder=tmp_path / "offload")
    fc1 = model.model.decoder.layers[0].fc1
    assert isinstance(fc1, QuantizedLinear)
    assert torch.equal(fc1.weight_packed.flatten(), codes.flatten())
    expected = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.quantization_config.quant_method == "bigq"
    assert torch.equal(again.model.decoder.layers[0].fc1.weight_packed, fc1.weight_packed)


@pytest.mark.parametrize("settings", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["int8", "4-bit"])
def test_flan_t5(flan_t5, settings):
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        flan_t5, quantization_config=config, device_map="auto", dtype=torch.float16
    )
    block = model.decoder.block[0].layer[-1].DenseReluDense
    assert block.wo.weight.dtype == torch.float32  # T5 overflows in float16
    assert isinstance(block.wi_0, QuantizedLinear)
    out = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 5
    assert model(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()


def test_a_plain_model_takes_accelerates_config(opt):
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig

    bnb_quantization_config = BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=6)
    with init_empty_weights():
        empty_model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(opt))
    empty_model.tie_weights()
    model = bigq.load_and_quantize_model(
        empty_model, weights_location=opt, bnb_quantization_config=bnb_quantization_config, device_map="auto"
    )
    assert formats(model) == {Int8}
