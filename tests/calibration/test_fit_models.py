"""fit on models of transformers and in minGPT's layout: every weight is measured, and the bytes are exact."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import bigq

transformers = pytest.importorskip("transformers")

STANDIN = Path(__file__).resolve().parents[1] / "examples" / "standin"
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    )


def mixtral(experts="eager"):
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts)


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mingpt():
    sys.path.insert(0, str(STANDIN))
    try:
        kind = importlib.import_module("mingpt.model").GPT
    finally:
        sys.path.remove(str(STANDIN))
        for name in [name for name in sys.modules if name.partition(".")[0] == "mingpt"]:
            del sys.modules[name]
    config = kind.get_default_config()
    config.model_type, config.n_layer, config.n_head, config.n_embd = None, 2, 4, 64
    config.vocab_size, config.block_size = 64, 32
    return kind(config)


MODELS = {  # how many weights there are to choose for
    "gpt2": (gpt2, 8),
    "mixtral": (mixtral, 12),
    "mixtral, grouped": (lambda: mixtral("grouped_mm"), 12),
    "t5": (t5, 2 * (5 + 9)),  # T5 keeps wo in float32
    "mingpt": (mingpt, 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_measured_and_bytes_are_exact(name):
    build, count = MODELS[name]
    model = build().eval()
    found = bigq.fit(model, bits=6.5, formats=["nf4", "int8"])
    assert len(found.weights) == count
    for weight in found.weights:
        small, large = (cost.sensitivity for cost in weight.costs)
        assert small > 30 * large > 0, weight.name  # int8 has a twelfth of the error, and errors are squared
    loaded = bigq.load_and_quantize_model(model, None, found.config, "cpu")
    assert bigq.memory_footprint(loaded).total_nbytes == found.nbytes
    assert {weight.format for weight in found.weights} == {bigq.NF4(), bigq.Int8()}


def test_experts_that_multiply_copies_are_refused_with_what_helps():
    with pytest.raises(
        bigq.ConfigError, match=r"nothing by 4 of its weights.*'batched_mm' multiplies copies.*'grouped_mm'"
    ):
        bigq.fit(mixtral("batched_mm").eval(), bits=6)


def test_both_implementations_of_experts_are_measured_alike():
    torch.manual_seed(0)
    model = mixtral().eval()
    each = []
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        each.append(bigq.fit(model, bits=6.5, tokens=10_000).weights)
    for one, other in zip(*each, strict=True):  # other labels do not matter: the sample holds every token
        assert one.name == other.name
        assert one.costs[0].sensitivity == pytest.approx(other.costs[0].sensitivity, rel=1e-3)


def test_an_encoder_without_a_head():
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
    )
    with pytest.raises(bigq.UnsupportedError, match=r"no logits, but \['last_hidden_state', 'pooler_output'\]"):
        bigq.fit(model, bits=6)
    found = bigq.fit(model, bits=6, sensitivity="output")
    assert len(found.weights) == 13
    assert all(0.005 < weight.costs[0].sensitivity < 0.015 for weight in found.weights)
    own = bigq.fit(model, bits=6, logits=lambda out: out.last_hidden_state)
    assert {weight.name: weight.costs[0].sensitivity for weight in own.weights}["pooler.dense.weight"] == 0.0
