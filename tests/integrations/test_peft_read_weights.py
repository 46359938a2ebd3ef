"""LoRA of PEFT on quantized weights that a forward reads: what the same adapter computes on the dequantized weights."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from bigq import NF4, Int8, QuantizationConfig, UnsupportedError, load_and_quantize_model
from bigq.integrations.peft import merge_costs
from dequantized import dequantized
from mixtures import mixture

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers", minversion="5.17", reason="needs experts in one weight")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in ("`is_gradient_checkpointing` is deprecated", "`gradient_checkpointing_enable` is deprecated")
]

IDS = torch.arange(12).view(2, 6) * 5 % 64
FORMATS = {"nf4": NF4(), "double": NF4(block_size=32, double_quant=True), "int8": Int8()}


class OwnExperts(nn.Module):
    """Stacks of both orders and a matrix, which the forward reads; an expert at a time."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 96, 64) * 0.1)  # [E, N, K]
        self.down = nn.Parameter(torch.randn(5, 96, 64) * 0.1)  # [E, K, N]
        self.mix = nn.Parameter(torch.randn(40, 64) * 0.1)

    def forward(self, x):
        for expert in range(len(self.up)):
            x = x + torch.relu(nn.functional.linear(x, self.up[expert])) @ self.down[expert]
        return nn.functional.linear(x, self.mix)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.experts = nn.Embedding(64, 64), OwnExperts()

    def forward(self, input_ids):
        return (self.experts(self.embed(input_ids)),)


def own():
    torch.manual_seed(0)
    return Own()


STACKS, EXPERTS = ["up", "down", "mix"], ["gate_up_proj", "down_proj"]
MODELS = {  # what makes it, and the weights to adapt
    "own": (own, STACKS),
    "jetmoe": (lambda: mixture("JetMoeForCausalLM"), ["input_linear.weight", "output_linear.weight"]),
    "llama4": (lambda: mixture("Llama4ForCausalLM"), EXPERTS),
    "longcat": (lambda: mixture("LongcatFlashForCausalLM"), EXPERTS),
}
each_model = pytest.mark.parametrize("name", MODELS)


def quantized(name, weight_format=FORMATS["nf4"], **settings):
    more = {"also_quantize": STACKS} if name == "own" else {}
    return load_and_quantize_model(MODELS[name][0](), None, QuantizationConfig(weight_format, **more), **settings)


def adapted(name, model):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": [], "target_parameters": MODELS[name][1], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def pair(name, weight_format=FORMATS["nf4"]):
    """The quantized model with an adapter, and the same adapter of plain PEFT on the dequantized model."""
    base = quantized(name, weight_format, device_map="cpu")
    plain = dequantized(base, MODELS[name][0]())
    return adapted(name, base), adapted(name, plain)


def factors(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "packed" in name or "absmax" in name}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def run(model):
    """The output, and the gradients of the adapter."""
    model.zero_grad()
    out = model(input_ids=IDS)[0]
    out.square().sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in factors(model).items()}


def assert_close(found, expected, budget=3e-6):
    assert (found - expected).norm() <= budget * expected.norm()


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@each_model
def test_outputs_and_gradients_are_those_of_plain_peft_on_the_dequantized_model(name, weight_format):
    model, plain = pair(name, weight_format)
    assert equal(factors(model), factors(plain))
    before = state(model)
    (out, gradients), (expected, others) = run(model), run(plain)
    budget = 3e-6 if weight_format.name == "nf4" or name == "own" else 0.1  # int8 rounds what linears multiply
    assert_close(out, expected, budget)
    if budget < 0.1:
        for key, gradient in gradients.items():
            assert gradient.norm() > 0
            assert_close(gradient, others[key], 2e-5)
    assert equal(state(model), before)
    with model.disable_adapter():
        base = model(input_ids=IDS)[0]
    assert torch.equal(base, quantized(name, weight_format, device_map="cpu")(input_ids=IDS)[0])
    assert (out - base).norm() > 1e-3 * base.norm()


@each_model
def test_files_merges_and_several_adapters_are_those_of_plain_peft(name, tmp_path):
    model, plain = pair(name)
    plain.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(name, device_map="cpu"), tmp_path)
    assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])
    for held in (model, plain):
        torch.manual_seed(2)
        settings = {"r": 2, "target_modules": [], "target_parameters": MODELS[name][1], "init_lora_weights": False}
        held.add_adapter("second", peft.LoraConfig(**settings))
        held.base_model.set_adapter(["default", "second"])
    assert_close(model(input_ids=IDS)[0], plain(input_ids=IDS)[0])
    for held in (model, plain):
        held.base_model.set_adapter("default")
    before, expected = state(model), model(input_ids=IDS)[0]
    assert len(merge_costs(model)) == len(factors(again)) // 2
    model.merge_adapter()
    assert not equal(state(model), before)
    model.unmerge_adapter()
    assert equal(state(model), before)
    assert torch.equal(model(input_ids=IDS)[0], expected)


def test_gradient_checkpointing_and_copies_give_the_same():
    model = adapted("llama4", quantized("llama4", device_map="cpu")).train()
    out, gradients = run(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert equal(run(model)[1], gradients)
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS)[0], out)


class CheckpointedExperts(OwnExperts):
    """Computes each expert again in the backward pass, within the forward that reads their weights."""

    reentrant = True

    def forward(self, x):
        for expert in range(len(self.up)):
            x = x + checkpoint(self.one, x, expert, use_reentrant=self.reentrant)
        return nn.functional.linear(x, self.mix)

    def one(self, x, expert):
        return torch.relu(nn.functional.linear(x, self.up[expert])) @ self.down[expert]


def checkpointed():
    """A model that trains its embedding, which reentrant checkpointing needs, and adapters."""
    model = own()
    model.experts.__class__ = CheckpointedExperts
    base = load_and_quantize_model(model, None, QuantizationConfig(NF4(), also_quantize=STACKS), device_map="cpu")
    model = adapted("own", base)
    base.embed.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpoint_inside_the_forward_is_refused(reentrant, monkeypatch):
    """In plain PEFT the reentrant kind leaves adapters without gradients, without a word."""
    monkeypatch.setattr(CheckpointedExperts, "reentrant", reentrant)
    with pytest.raises((UnsupportedError, CheckpointError), match=r"the backward pass reads|number of tensors"):
        run(checkpointed())


def _gradient(model, call):
    model.zero_grad()
    call(input_ids=IDS)[0].square().sum().backward()
    return model.get_base_model().embed.weight.grad


def test_a_checkpoint_inside_the_forward_without_an_adapter_is_right():
    model = checkpointed()
    model(input_ids=IDS)
    expected = load_and_quantize_model(own(), None, QuantizationConfig(NF4(), also_quantize=STACKS), device_map="cpu")
    expected(input_ids=IDS)[0].square().sum().backward()
    expected = expected.embed.weight.grad
    base = model.unload()
    base(input_ids=IDS)[0].square().sum().backward()
    assert torch.equal(base.embed.weight.grad, expected)


def test_a_checkpoint_around_a_disabled_adapter_is_right():
    model = adapted("own", quantized("own", device_map="cpu"))
    model.get_base_model().embed.weight.requires_grad_(True)
    model(input_ids=IDS)
    with model.disable_adapter():
        expected = _gradient(model, model)
        layer = model.get_base_model().experts
        forward = layer.forward
        layer.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
        assert torch.equal(_gradient(model, model), expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["own", "llama4"])
def test_offloaded_weights_are_changed_where_they_run(name, place, tmp_path):
    experts = {"own": "experts", "llama4": "model.layers.0.feed_forward.experts"}[name]
    settings = {"device_map": {"": "cpu", experts: place}, "offload": "quantized", "offload_folder": tmp_path}
    model = adapted(name, quantized(name, **settings))
    (out, gradients), (expected, others) = run(model), run(adapted(name, quantized(name, device_map="cpu")))
    assert torch.equal(out, expected)
    assert equal(gradients, others)


def test_a_first_read_without_gradients_leaves_those_of_the_next_read():
    """Such as of a norm, or of what a hook looks at."""
    experts = quantized("own", device_map="cpu").experts
    change = torch.ones((), requires_grad=True)
    with experts.changed("mix", lambda weight: weight * change):
        with torch.inference_mode():
            seen = experts.mix
        with torch.no_grad():
            norm = experts.mix.norm()
        read = experts.mix
        assert experts.mix is read
    assert torch.equal(seen, read)
    (read.sum() / norm).backward()
    with torch.no_grad():
        assert_close(change.grad, experts.mix.dequantize().sum() / norm)


def test_threads_change_what_they_read_themselves():
    """Each call ends while the other one runs, in both orders."""
    model = adapted("own", quantized("own", device_map="cpu"))
    experts = model.base_model.model.experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    expected, steps = experts.up.dequantize(), Barrier(2)

    def read(number):
        with experts.changed("up", lambda weight: weight + number):
            steps.wait()
            found = experts.up
            if number == 1:
                steps.wait()  # the second call ends first
        if number == 2:
            steps.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read, (1, 2)))
    assert all(torch.equal(weight, expected + number) for number, weight in enumerate(found, start=1))
    assert torch.equal(experts.up.dequantize(), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, of a graph break
def test_compiled_it_gives_the_same():
    model = adapted("own", quantized("own", device_map="cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(input_ids=IDS)[0], model(input_ids=IDS)[0])
