"""Every tuner of PEFT on quantized weights: it trains them as it trains the float weights that they stand for."""

import pytest
import torch

from bigq import NF4, Int8
from dequantized import dequantized

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from adapted import distance, float_twin, logits, moved, quantized, run, tuned  # noqa: E402  # it imports peft
from tuners import IDS, TUNERS, llama, lora  # noqa: E402

# What PEFT says of these tuners on any model, quantized or not.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        "`is_gradient_checkpointing` is deprecated",
        "Setting `save_embedding_layers` to `True`",
        "`lora_bias=True` was passed but the targeted layer",
        "Detected that the base layer has no bias term",
        "Adapter 'default'",  # the biases of lora_bias
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor to 1",
        "Sparse invariant checks are implicitly disabled",
        "Unsupported layer type '<class 'transformers.models.llama.modeling_llama.LlamaRMSNorm'>'",
    )
]
KINDS = {kind.__name__ for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()}
ELSEWHERE = {"GloraConfig", "XLoraConfig"}  # have a test of their own here


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


def gradients(model, name):
    """{name: gradient} of one step."""
    model.train()
    run(model, name, labels=IDS).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_all_kinds_of_tuners_are_here():
    kinds = {type(config()).__name__ for config in TUNERS.values()}
    assert kinds | ELSEWHERE == KINDS


@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_trains_a_quantized_model(name, weight_format, tmp_path):
    base = quantized(weight_format)
    before = [(p, p.detach().clone()) for p in base.parameters()]
    own_error = distance(logits(base), logits(dequantized(base, llama())))
    model = moved(tuned(base, TUNERS[name]()))
    trainable = [p for p in model.parameters() if p.requires_grad]

    # Output and gradients are those of float weights; int8 rounds its activations too.
    twin = float_twin(model, TUNERS[name](), weight_format)
    assert distance(logits(model, name), logits(twin, name)) <= (2 * own_error if own_error > 1e-5 else 1e-5)
    found, expected = gradients(model, name), gradients(twin, name)
    assert found.keys() == expected.keys() != set()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any(gradient.any() for gradient in found.values())
    if own_error < 1e-5:
        assert all(torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-5) for key in found)

    # A step changes the adapter and nothing else.
    torch.optim.SGD(trainable, lr=0.05).step()
    kept = {id(p) for p in model.parameters()}
    assert all(id(p) in kept and torch.equal(p, copy) for p, copy in before)

    # It is saved, and loads into a model that is quantized anew.
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(weight_format), tmp_path)
    if name == "cpt":  # normalizes its parameters in every call
        assert distance(logits(again, name), logits(model, name)) < 1e-6
    else:
        assert torch.equal(logits(again, name), logits(model, name))


def test_glora_says_that_it_takes_plain_linears_only(weight_format):
    config = peft.GloraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"not a plain torch\.nn\.Linear"):
        tuned(quantized(weight_format), config)


def test_x_lora_mixes_adapters(weight_format, tmp_path):
    folders = {name: str(tmp_path / name) for name in ("0", "1")}  # PEFT gives the adapters these names
    for folder in folders.values():
        tuned(quantized(weight_format), lora(init_lora_weights=False)).save_pretrained(folder)
    base = quantized(weight_format)
    base.config.use_cache = False  # as X-LoRA asks
    config = peft.XLoraConfig(hidden_size=64, adapters=folders, xlora_size=16, task_type="CAUSAL_LM")
    model = tuned(base, config)
    before = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    run(model.train(), "lora", labels=IDS).loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert found
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    assert all(torch.equal(p, copy) for p, copy in before)
    assert distance(logits(model), logits(quantized(weight_format))) > 0.05


def test_arrow_routes_between_adapters(weight_format, tmp_path):
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for folder, by in zip(folders, (0.1, 0.2), strict=True):
        moved(tuned(llama(), lora(init_lora_weights=False)), by=by).save_pretrained(folder)

    def routed(base):
        torch.manual_seed(1)
        return peft.create_arrow_model(base, folders, peft.ArrowConfig(top_k=1))

    base = quantized(weight_format)
    plain, own_error = logits(base), distance(logits(base), logits(dequantized(base, llama())))
    found, expected = logits(routed(base)), logits(routed(dequantized(quantized(weight_format), llama())))
    assert distance(found, expected) <= max(2 * own_error, 1e-5)
    assert distance(found, plain) > 0.5
