"""compare: a folder beside what bigq and bitsandbytes made of it; every number against a computation of its own."""

import math
from functools import partial

import pytest
import torch

import bigq
from bigq.errors import CheckpointError, ConfigError, UnsupportedError
from bigq.evaluation import compare as module
from bigq.evaluation.plot import plot_comparison

transformers = pytest.importorskip("transformers")

compare = partial(bigq.compare, device="cpu")

RANDOM = "Perplexity is left out: there is no text. Outputs are those of random token ids."


def _quantized(llama, config="nf4", **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    return bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig(config, **settings), device_map="cpu")


@pytest.fixture
def letters(monkeypatch):
    """A tokenizer whose ids are those of bytes, 96 of them, and that begins texts with id 1."""

    class Letters:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = [byte % 96 for byte in text.encode()]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    monkeypatch.setattr(module, "tokenizer_of", lambda name, trust_remote_code: Letters())
    return Letters()


def _logits(model, windows):
    with torch.no_grad():
        return [model(torch.tensor([window])).logits[0] for window in windows]


def test_every_number_of_a_saved_model(llama, letters, tmp_path):
    model = _quantized(llama)
    bigq.save_quantized(model, tmp_path, layout="bigq")
    text = "a text of some letters, which is longer than one window"
    found = compare(llama, tmp_path, text=text, context=16, batches=[1, 2], prompt_tokens=8, new_tokens=2)

    ids = letters(text, add_special_tokens=False)["input_ids"]
    windows = [[1, *ids[start : start + 15]] for start in range(0, len(ids), 15)]
    before = _logits(transformers.AutoModelForCausalLM.from_pretrained(llama), windows)
    after = _logits(model, windows)
    losses = [
        torch.cat([-own[:-1].log_softmax(1)[range(len(w) - 1), w[1:]] for own, w in zip(logits, windows, strict=True)])
        for logits in (before, after)
    ]
    change = (losses[1] - losses[0]).double()
    perplexity = found.perplexity
    assert perplexity.tokens == len(ids)
    assert perplexity.source == pytest.approx(math.exp(losses[0].mean()), rel=1e-5)
    assert perplexity.quantized == pytest.approx(math.exp(losses[1].mean()), rel=1e-5)
    assert perplexity.change_nats == pytest.approx(change.mean().item(), rel=1e-3)
    assert perplexity.standard_error == pytest.approx((change.std() / math.sqrt(len(ids))).item(), rel=1e-3)

    p, q = (torch.cat(logits).double().log_softmax(1) for logits in (before, after))
    assert found.logits.tokens == sum(map(len, windows))
    assert found.logits.kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-3)
    assert found.logits.top1_agreement == (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert found.logits.kl > 1e-6

    assert found.source.files_nbytes == (llama / "model.safetensors").stat().st_size
    assert found.quantized.files_nbytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.quantized.memory_nbytes == bigq.memory_footprint(model).total_nbytes < found.source.memory_nbytes
    assert 0.08 < found.weight_error < 0.11
    assert [speed.batch for speed in found.quantized.speeds] == [1, 2]
    assert all(s.prefill.value > 0 and s.decode.value > 0 for s in (*found.source.speeds, *found.quantized.speeds))
    assert found.notes == ("Peak memory is left out: torch does not count the memory of a CPU.",)
    assert [name for name, *_ in found.rows()][-4:] == [
        "prefill, batch 1, tokens/s",
        "decode, batch 1, tokens/s",
        "prefill, batch 2, tokens/s",
        "decode, batch 2, tokens/s",
    ]

    plot_comparison(found, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_on_the_fly_and_bitsandbytes_layout_are_the_saved_model(llama, tmp_path):
    """The same codes and scales, so the same numbers bit for bit."""
    bigq.save_quantized(_quantized(llama, block_size=32), tmp_path, layout="bitsandbytes")
    saved = compare(llama, tmp_path, batches=[])
    made = compare(llama, None, bigq.QuantizationConfig("nf4", block_size=32), batches=[])
    assert made.logits == saved.logits
    assert made.groups == saved.groups
    assert made.notes == (RANDOM,)
    assert (made.quantized.files_nbytes, made.perplexity) == (None, None)
    assert made.logits.tokens == 512


def test_a_model_beside_itself_differs_by_nothing(llama, monkeypatch):
    """The quantized side is the float model itself: every difference is 0."""
    monkeypatch.setattr(module, "open_quantized_model", lambda *a, **k: module.open_float_model(llama, a[3]))
    found = compare(llama, None, bigq.QuantizationConfig("nf4"), batches=[])
    assert (found.logits.relative_error, found.logits.kl, found.logits.top1_agreement) == (0.0, 0.0, 1.0)
    assert {group.error for group in found.groups} == {0.0}
    assert found.weight_error == 0.0


def test_hidden_states_of_an_encoder(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    found = compare(tmp_path, None, bigq.QuantizationConfig("int8"), batches=[1], prompt_tokens=8)
    assert 0 < found.logits.relative_error < 0.1
    assert (found.logits.kl, found.source.speeds[0].decode) == (None, None)
    assert "BertModel does not predict the next token" in found.notes[0]
    with pytest.raises(ConfigError, match="BertModel does not predict the next token"):
        compare(tmp_path, None, bigq.QuantizationConfig("int8"), text="a")


def test_a_model_of_pictures_has_weights_only(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    found = compare(tmp_path, None, bigq.QuantizationConfig("nf4"))
    assert (found.logits, found.quantized.speeds) == (None, ())
    assert found.notes == (
        "Outputs and speed are left out: ViTModel is not called with token ids alone: it takes pixel_values.",
    )
    assert 0.08 < found.weight_error < 0.11


def test_a_model_of_tokens_and_pictures_has_weights_only(tmp_path):
    """CLIP says that its main input is token ids, and raises without pictures."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 64}, vision_config={**small, "image_size": 32, "patch_size": 16}
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    found = compare(tmp_path, None, bigq.QuantizationConfig("nf4"))
    assert (found.logits, len(found.notes)) == (None, 1)
    assert "CLIPModel is not called with token ids alone: a call with token ids raises AttributeError" in found.notes[0]
    with pytest.raises(ConfigError, match="is not called with token ids alone"):
        compare(tmp_path, None, bigq.QuantizationConfig("nf4"), text="a text")


@pytest.mark.gpu
def test_on_a_gpu(llama):
    found = bigq.compare(llama, None, bigq.QuantizationConfig("nf4"), batches=[1], prompt_tokens=8, new_tokens=2)
    assert found.environment.device == torch.cuda.get_device_name()
    assert found.notes == (RANDOM,)
    peaks = [side.speeds[0].peak_nbytes for side in (found.source, found.quantized)]
    assert all(peak >= side.memory_nbytes for peak, side in zip(peaks, (found.source, found.quantized), strict=True))
    on_cpu = compare(llama, None, bigq.QuantizationConfig("nf4"), batches=[])
    for one, other in zip(found.groups, on_cpu.groups, strict=True):
        assert (one.group, one.format, one.nbytes) == (other.group, other.format, other.nbytes)
        assert one.error == pytest.approx(other.error, rel=1e-5)
    assert found.logits.kl == pytest.approx(on_cpu.logits.kl, rel=0.05)


def test_a_dtype_is_that_of_both_models(llama):
    found = compare(llama, None, bigq.QuantizationConfig("int8"), dtype=torch.bfloat16, batches=[])
    assert found.source.dtypes == found.quantized.dtypes == ("bfloat16",)
    with pytest.raises(ConfigError, match="which has dtypes of its own"):
        compare(llama, llama, dtype=torch.bfloat16)


def test_what_is_refused(llama, tmp_path):
    config = bigq.QuantizationConfig("nf4")
    with pytest.raises(ConfigError, match="pass either a quantized checkpoint or a config"):
        compare(llama)
    with pytest.raises(ConfigError, match=r"tokens is 1; expected 2 or more"):
        compare(llama, None, config, tokens=1)
    with pytest.raises(ConfigError, match=r"batches is \[0\]"):
        compare(llama, None, config, batches=[0])
    with pytest.raises(ConfigError, match="exceed the 128 positions of LlamaForCausalLM"):
        compare(llama, None, config, prompt_tokens=120)
    with pytest.raises(CheckpointError, match="no such folder"):
        compare(tmp_path / "nothing", None, config)
    with pytest.raises(UnsupportedError, match="a text needs the tokenizer of"):
        compare(llama, None, config, text="a text")
    bigq.save_quantized(_quantized(llama), tmp_path)
    with pytest.raises(ConfigError, match=r"is quantized already \(quant_method 'bigq'\)"):
        compare(tmp_path, None, config)


def test_infinite_outputs_are_said(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.model.norm.weight.data.fill_(float("inf"))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM computes NaN or Inf for .* in torch.float32"):
        compare(tmp_path, None, bigq.QuantizationConfig("nf4"))


def test_what_is_wrong_with_the_quantized_model_is_said_before_the_source_is_loaded(llama, tmp_path, monkeypatch):
    def loaded(*args, **settings):
        raise AssertionError("the source was loaded")

    monkeypatch.setattr(module, "open_float_model", loaded)
    nowhere = tmp_path / "nowhere"
    cases = [
        (nowhere, None, CheckpointError, "nowhere"),
        (llama, None, ConfigError, "is not quantized"),
        (None, bigq.QuantizationConfig("nf4", skip_modules=["layres"]), ConfigError, "layres"),
    ]
    for quantized, config, error, words in cases:
        with pytest.raises(error, match=words):
            compare(llama, quantized, config, device="cpu")
