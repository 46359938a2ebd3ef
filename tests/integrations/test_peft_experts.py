"""LoRA of PEFT on quantized experts: what the same adapter of plain PEFT computes on the dequantized experts."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file

from bigq import FP4, NF4, Int8, QuantizationConfig, QuantizedModule, load_and_quantize_model
from bigq.integrations.peft import merge_costs
from dequantized import dequantized

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs experts in one weight")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        "`is_gradient_checkpointing` is deprecated",
        "`gradient_checkpointing_enable` is deprecated",
        "The following (rank|alpha)_pattern keys did not match any targeted",  # but a parameter, which PEFT leaves out
        "Adapter default was active which is now deleted",
    )
]

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "initializer_range": 0.15}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = ["gate_up_proj", "down_proj"]
FORMATS = {"nf4": NF4(), "double": NF4(block_size=32, double_quant=True), "fp4": FP4()}
FEW, MANY = torch.tensor([[5]]), torch.arange(24).view(2, 12) * 5 % 64  # rows that are routed, and that are grouped


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()


def gpt_oss():  # transposed, interleaved, with biases
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, num_experts_per_tok=2)).eval()


MODELS = {"mixtral": mixtral, "gpt-oss": gpt_oss}


def quantized(build=mixtral, weight_format=FORMATS["nf4"], **settings):
    return load_and_quantize_model(build(), None, QuantizationConfig(weight_format, **settings), "cpu")


def lora(**settings):
    own = {"r": 4, "target_modules": [], "target_parameters": EXPERTS, "init_lora_weights": False}
    return peft.LoraConfig(**{**own, **settings})


def adapted(model, **settings):
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora(**settings))


def pair(build=mixtral, weight_format=FORMATS["nf4"], **settings):
    """The quantized model with an adapter, and the same adapter of plain PEFT on the dequantized model."""
    plain = dequantized(quantized(build, weight_format), build())
    return adapted(quantized(build, weight_format), **settings), adapted(plain, **settings)


def factors(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def state(model):
    held = model.state_dict().items()
    return {name: tensor.clone() for name, tensor in held if name.endswith(("_packed", "_absmax", "quant_state"))}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def assert_close(found, expected, budget=3e-6):
    """`budget` is the distance relative to the norm; float32 differs by the order of sums."""
    assert (found - expected).norm() <= budget * expected.norm()


def gradients(model, ids):
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in factors(model).items()}


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_outputs_and_gradients_are_those_of_plain_peft_on_the_dequantized_model(build, weight_format, ids):
    model, plain = pair(build, weight_format)
    assert len(factors(model)) == 8
    assert equal(factors(model), factors(plain))
    before = state(model)
    assert_close(model(ids).logits, plain(ids).logits)
    with plain.disable_adapter():
        without = plain(ids).logits
    assert (model(ids).logits - without).norm() > 0.1 * without.norm()
    found, expected = gradients(model, ids), gradients(plain, ids)
    for name, gradient in found.items():
        assert gradient.norm() > 0
        assert_close(gradient, expected[name], 2e-5)
    assert equal(state(model), before)


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_the_input_gets_the_gradient_of_plain_peft(ids):
    grads = []
    for model in pair(gpt_oss):
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        grads.append(x.grad)
    assert_close(*grads, 1e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_ranks_and_sizes_that_no_product_of_torch_takes_are_filled_up(rank):
    model, plain = pair(r=rank, lora_alpha=5, use_rslora=True, rank_pattern={"down_proj": 2})
    assert {factor.shape[0] // 8 for name, factor in factors(model).items() if "lora_A" in name} == {rank, 2}
    assert_close(model(MANY).logits, plain(MANY).logits)


def test_a_step_of_training_is_that_of_plain_peft():
    losses = []
    for model in pair(gpt_oss):
        optimizer = torch.optim.AdamW(factors(model).values(), lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model.train()(input_ids=MANY, labels=MANY).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    ours, theirs = losses
    assert ours[-1] < 0.9 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_recipe_for_k_bit_models_trains_experts_and_linears(tmp_path):
    def base():
        model = load_and_quantize_model(mixtral().bfloat16(), None, QuantizationConfig("nf4"), "cpu")
        return peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})

    model = adapted(base(), target_modules="all-linear", target_parameters=None, init_lora_weights=True)
    assert len([name for name in factors(model) if "lora_A" in name and "mlp.experts" in name]) == 4
    optimizer, losses = torch.optim.AdamW(factors(model).values(), lr=1e-2), []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(input_ids=MANY, labels=MANY).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(MANY).logits, model(MANY).logits)


def test_the_files_are_those_of_plain_peft_in_both_directions(tmp_path):
    model, plain = pair(gpt_oss, target_modules=["q_proj"])
    for name, source, base in (
        ("ours", model, dequantized(quantized(gpt_oss), gpt_oss())),
        ("theirs", plain, quantized(gpt_oss)),
    ):
        source.save_pretrained(tmp_path / name)
        again = peft.PeftModel.from_pretrained(base, tmp_path / name).eval()
        assert equal(factors(again), factors(source))
        assert_close(again(MANY).logits, source(MANY).logits)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert equal(ours, theirs)


def test_without_its_adapter_the_model_is_the_quantized_one():
    expected = quantized()(MANY).logits
    model = adapted(quantized())
    with model.disable_adapter():
        assert torch.equal(model(MANY).logits, expected)
    assert torch.equal(model.unload()(MANY).logits, expected)


def test_several_adapters_are_switched_and_summed():
    model, plain = pair()
    for held in (model, plain):
        torch.manual_seed(2)
        held.add_adapter("second", lora(r=2))
    for active in ("second", ["default", "second"], "default"):
        for held in (model, plain):
            held.base_model.set_adapter(active)
        assert_close(model(MANY).logits, plain(MANY).logits)
    for held in (model, plain):
        held.delete_adapter("default")
    assert_close(model(MANY).logits, plain(MANY).logits)


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_merge_quantizes_the_sum_and_an_unmerge_leaves_no_trace(build, weight_format):
    model, plain = pair(build, weight_format)
    before, expected = state(model), model(MANY).logits
    costs = merge_costs(model)
    assert sorted(costs) == [
        f"base_model.model.model.layers.{layer}.mlp.experts.{leaf}" for layer in range(2) for leaf in sorted(EXPERTS)
    ]
    assert equal(state(model), before)
    original = quantized(build, weight_format).model.layers[1].mlp.experts
    originals = {leaf: getattr(original, leaf).dequantize() for leaf in EXPERTS}
    model.merge_adapter()
    plain.merge_adapter()
    merged = plain.base_model.model.model.layers[1].mlp.experts.base_layer.base_layer
    experts = model.base_model.model.model.layers[1].mlp.experts.base_layer.base_layer
    for leaf in EXPERTS:
        found, wanted = getattr(experts, leaf).dequantize(), getattr(merged, leaf).detach()
        rows = wanted.mT if experts.is_transposed else wanted
        requantized = weight_format.dequantize(weight_format.quantize(rows.contiguous()), rows.shape, torch.float32)
        assert_close(found, requantized.mT if experts.is_transposed else requantized, 1e-6)
        base, cost = originals[leaf], costs[f"base_model.model.model.layers.1.mlp.experts.{leaf}"]
        assert cost.change == pytest.approx(((wanted - base).norm() / base.norm()).item(), rel=1e-3)
        assert cost.rounding == pytest.approx(((found - wanted).norm() / base.norm()).item(), rel=1e-3)
    assert (model(MANY).logits - plain(MANY).logits).norm() < 0.7 * expected.norm()
    assert not equal(state(model), before)
    model.unmerge_adapter()
    assert equal(state(model), before)
    assert torch.equal(model(MANY).logits, expected)


def test_a_merge_that_was_unloaded_is_the_quantized_sum():
    model = adapted(quantized())
    held = copy.deepcopy(model)
    held.merge_adapter()
    expected = held(MANY).logits
    unloaded = model.merge_and_unload(safe_merge=True)
    assert not [name for name, _ in unloaded.named_modules() if "base_layer" in name or "lora" in name]
    assert isinstance(unloaded.model.layers[0].mlp.experts, QuantizedModule)
    assert torch.equal(unloaded(MANY).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = adapted(quantized()).train()
    expected = gradients(model, MANY)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert equal(gradients(model, MANY), expected)


def test_bfloat16_and_autocast_round_as_plain_peft_does():
    model, plain = pair()
    exact = plain(MANY).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(MANY).logits, plain(MANY).logits
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
    ours, theirs = model.bfloat16()(MANY).logits, plain.bfloat16()(MANY).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
    assert all(gradient.isfinite().all() for gradient in gradients(model, MANY).values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiled_it_is_one_graph_with_the_same_numbers(dtype):
    model = adapted(quantized()).to(dtype)
    for ids in (FEW, MANY):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        expected = gradients(model, ids)
        model.zero_grad()
        logits = compiled(ids).logits
        assert_close(logits, model(ids).logits)
        logits.square().sum().backward()
        for name, factor in factors(model).items():
            assert_close(factor.grad, expected[name], 2e-5)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_an_adapter_of_its_own(copied):
    model = adapted(quantized())
    expected = model(MANY).logits
    again = copied(model)
    with torch.no_grad():
        for factor in factors(model).values():
            factor.zero_()
    assert torch.equal(again(MANY).logits, expected)
    assert not torch.equal(model(MANY).logits, expected)


def test_an_expert_that_does_not_exist_adds_nothing_to_any_gradient():
    experts = adapted(quantized(gpt_oss)).base_model.model.model.layers[0].mlp.experts
    for tokens in (1, 12):
        x, ids = torch.randn(tokens, 64), torch.stack([torch.randperm(8)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2)
        grads = []
        for more in (0, 2):
            leaf = x.clone().requires_grad_()
            experts.zero_grad()
            foreign = torch.tensor([8, -1])[:more].expand(tokens, more)
            out = experts(leaf, torch.cat([ids, foreign], dim=1), torch.cat([weights, torch.rand(tokens, more)], dim=1))
            out.square().sum().backward()
            grads.append([out.detach(), leaf.grad, *(factor.grad for factor in factors(experts).values())])
        torch.testing.assert_close(*grads)


def test_no_token_gives_no_row_and_no_gradient():
    experts = adapted(quantized()).base_model.model.model.layers[0].mlp.experts
    x = torch.randn(0, 64, requires_grad=True)
    experts(x, torch.zeros(0, 2, dtype=torch.int64), torch.rand(0, 2)).sum().backward()
    assert x.grad.shape == (0, 64)
    assert not any(factor.grad.any() for factor in factors(experts).values())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_adapter_on_offloaded_experts_computes_where_they_run(place, tmp_path):
    expected = adapted(quantized())(MANY).logits
    device_map = {"": "cpu", "model.layers.1": place, "model.layers.0.mlp.experts": place}
    config = QuantizationConfig("nf4", offload="quantized")
    base = load_and_quantize_model(mixtral(), None, config, device_map, offload_folder=tmp_path)
    model = adapted(base)
    assert torch.equal(model(MANY).logits, expected)
    assert equal(gradients(model, MANY), gradients(adapted(quantized()), MANY))


@pytest.mark.skipif(not Int8().has_stack_products, reason="transformers' code computes experts in int8")
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_experts_in_int8_round_their_inputs_beside_the_adapter(build):
    """Of one layer: the rounding of one may send a token to another expert in the next."""
    for tokens in (1, 12):
        x = torch.randn(tokens, 64, requires_grad=True)
        ids = torch.stack([torch.randperm(8)[:2] for _ in range(tokens)])
        weights, results = torch.rand(tokens, 2), []
        for model in pair(build, Int8()):
            experts = model.base_model.model.model.layers[0].mlp.experts
            out = experts(x, ids, weights)
            leaves = [x, *factors(experts).values()]
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for found, expected in zip(*results, strict=True):
            assert_close(found, expected, 0.03)


def test_an_implementation_of_transformers_that_reads_the_weights_gives_the_same():
    model = adapted(quantized())
    expected, found = model(MANY).logits, gradients(model, MANY)
    model.base_model.model.set_experts_implementation("eager")
    assert_close(model(MANY).logits, expected)
    for name, gradient in gradients(model, MANY).items():
        assert_close(gradient, found[name], 2e-5)


def test_dropout_is_refused_by_peft():
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        adapted(quantized(), lora_dropout=0.1)
