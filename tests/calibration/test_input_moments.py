"""input_moments: the mean square of what each weight is multiplied with, whatever holds it, and nothing left behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigq import ConfigError, QuantizationConfig, QuantizedModule, input_moments, load_and_quantize_model
from mixtures import mixture


class Block(nn.Module):
    """Two linears, one of them in float32 among bfloat16 ones, and one that nobody calls."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.spare = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.down(self.dropout(F.relu(self.up(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


SPARE = ("blocks.0.spare.weight", "blocks.1.spare.weight")


def expected(model, batches):
    """The moments of every linear, computed in float64 by a model of its own code."""
    model = copy.deepcopy(model).double().eval()
    ids = torch.cat([batch.flatten() for batch in batches])[None]
    found, x = {}, model.words(ids)
    for place, block in enumerate(model.blocks):
        found[f"blocks.{place}.up.weight"] = x
        hidden = F.relu(F.linear(x, block.up.weight, block.up.bias))
        found[f"blocks.{place}.down.weight"] = hidden
        x = x + F.linear(hidden, block.down.weight, block.down.bias)
    found["words.weight"] = x  # the first name of the weight that the head shares
    return {name: inputs[0].square().mean(dim=0).float() for name, inputs in found.items()}


def assert_close(moments, wanted, rtol=1e-5):
    assert set(moments) == set(wanted)
    for name, tensor in moments.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, wanted[name], rtol=rtol, atol=rtol * wanted[name].mean().item(), msg=name)


def state_of(model):
    """What a measurement could leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, [m.training for m in model.modules()], [(name, type(m)) for name, m in model.named_modules()]


def test_moments_are_means_over_all_tokens_of_all_batches():
    model, batches = Model(), [torch.randint(20, (2, 7)), torch.randint(20, (1, 30))]
    model.blocks[1].eval()  # each module gets its own mode back
    before = state_of(model)
    moments = input_moments(model, [batches[0], {"ids": batches[1]}])
    assert_close(moments, expected(model, batches))
    assert moments.unreached == SPARE
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_ids_are_those_of_the_seed():
    model = Model()
    first, again, other = (input_moments(model, seed=seed) for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])


def test_quantized_and_offloaded_models():
    batches = [torch.randint(20, (4, 50))]
    model = Model()
    wanted = expected(model, batches)
    del wanted["words.weight"]
    for device_map in ("cpu", {"": "cpu", "blocks.1": "disk"}):
        config = QuantizationConfig("int8", also_quantize=["words"], offload="quantized")
        int8 = load_and_quantize_model(copy.deepcopy(model), None, config, device_map=device_map)
        moments = input_moments(int8, batches)
        assert moments.unreached == SPARE
        # The name of the tied weight stays that of the embedding. Weights in int8 change activations by a few percent.
        assert set(moments) == {*wanted, "words.weight"}
        for name, tensor in wanted.items():
            assert (moments[name] - tensor).norm() < 0.1 * tensor.norm(), name


def test_conv1d_and_linears_of_transformers_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    moments = input_moments(model)
    assert {name: len(tensor) for name, tensor in moments.items()} == {
        "transformer.wte.weight": 24,
        "transformer.h.0.attn.c_attn.weight": 24,
        "transformer.h.0.attn.c_proj.weight": 24,
        "transformer.h.0.mlp.c_fc.weight": 24,
        "transformer.h.0.mlp.c_proj.weight": 96,
    }
    assert moments.unreached == ()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts(implementation):
    """Both stacks where torch's products read them; where their entries are copied first, the first stack."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,  # K of both stacks is the same
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation=implementation,
    )
    model = transformers.MixtralForCausalLM(config)
    (name, experts), *_ = ((name, m) for name, m in model.named_modules() if hasattr(m, "down_proj"))
    seen = []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    moments = input_moments(model, [torch.randint(50, (2, 20))])
    handle.remove()
    ((x, chosen, _),) = seen
    torch.testing.assert_close(moments[f"{name}.gate_up_proj"], x.square().mean(dim=0))
    if implementation == "batched_mm":
        assert moments.unreached == (f"{name}.down_proj",)
        return
    hidden = []
    with torch.no_grad():
        for token, entries in zip(x, chosen, strict=True):
            for entry in entries:
                gate, up = F.linear(token, experts.gate_up_proj[entry]).chunk(2)
                hidden.append(F.silu(gate) * up)
    torch.testing.assert_close(moments[f"{name}.down_proj"], torch.stack(hidden).square().mean(dim=0))
    assert moments.unreached == ()


def test_other_weights_are_not_measured():
    """The width of an image is no number of input features, also where it equals the width of a kernel."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(2), nn.Linear(9, 5))
    config = QuantizationConfig("nf4", rules={"0": "nf4", "2": "nf4"})
    loaded = load_and_quantize_model(model, None, config, device_map="cpu")
    assert [name for name, m in loaded.named_modules() if isinstance(m, QuantizedModule)] == ["0", "2"]
    moments = input_moments(loaded, [torch.randn(6, 2, 3, 3)])
    assert list(moments) == ["2.weight"]
    assert moments.unreached == ()


class Experts(nn.Module):
    """What transformers calls fused experts; with `is_transposed`, [E, K, N]."""

    def __init__(self, *, is_transposed):
        super().__init__()
        self.num_experts, self.is_transposed = 2, is_transposed
        shapes = ((2, 40, 24), (2, 24, 20))
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.randn(shape).mT.contiguous() if is_transposed else torch.randn(shape))
            for shape in shapes
        )

    def forward(self, x):
        entry = 1
        up, down = (w[entry] if self.is_transposed else w[entry].mT for w in (self.gate_up_proj, self.down_proj))
        return F.relu(x @ up)[..., :20] @ down


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_of_either_layout_offloaded_or_quantized(is_transposed):
    x = torch.randn(7, 24)
    model = nn.Sequential(nn.Linear(24, 24), Experts(is_transposed=is_transposed), nn.Linear(24, 3))
    moments = input_moments(model, [x])
    with torch.no_grad():
        first = model[0](x)
        up = model[1].gate_up_proj[1]
        hidden = F.relu(first @ (up if is_transposed else up.mT))[:, :20]
    wanted = {"0.weight": x, "1.gate_up_proj": first, "1.down_proj": hidden, "2.weight": model[1](first).detach()}
    assert_close(moments, {name: inputs.square().mean(dim=0) for name, inputs in wanted.items()})

    config = QuantizationConfig(rules={"0": "int8", "1.down_proj": "int8"})
    int8 = load_and_quantize_model(
        copy.deepcopy(model), None, config, device_map={"": "cpu", "1": "disk"}, offload="quantized"
    )
    found = input_moments(int8, [x])
    assert torch.allclose(found["1.gate_up_proj"], moments["1.gate_up_proj"], rtol=0.1)
    assert found.unreached == ("1.down_proj",)

    def fail(module, args):
        raise RuntimeError("a hook of someone else")

    handle = model[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="someone else"):
        input_moments(model, [x])
    handle.remove()
    assert set(input_moments(model, [x])) == set(wanted)


def test_an_error_of_the_model_leaves_nothing_behind():
    model = Model()
    before = state_of(model)
    with pytest.raises(IndexError):
        input_moments(model, [torch.tensor([[3]]), torch.tensor([[20]])])
    assert state_of(model) == before


def test_activations_that_are_not_finite_name_the_layer():
    model = Model()
    with torch.no_grad():
        model.blocks[1].up.bias[3] = float("inf")
    with pytest.raises(ConfigError, match=r"the inputs of 2 weights hold NaN or Inf: blocks\.1\.down\.weight, words"):
        input_moments(model)


def test_a_model_without_linears_and_batches_that_reach_none_are_refused():
    with pytest.raises(ConfigError, match=r"reached none of the 0 linears of Sequential: it has none"):
        input_moments(nn.Sequential(nn.Embedding(5, 4)))
    model = Model()
    model.blocks, model.head.forward = nn.ModuleList(), lambda x: x
    with pytest.raises(ConfigError, match=r"reached none of the 1 linears of Model: words\.weight"):
        input_moments(model, [torch.empty(0, 3, dtype=torch.int64)])


@pytest.mark.gpu
def test_a_model_offloaded_from_a_gpu():
    model, batches = Model(), [torch.randint(20, (4, 50))]
    wanted = expected(model, batches)
    loaded = load_and_quantize_model(
        model, None, QuantizationConfig("nf4", rules={"head": None}), device_map={"": 0, "blocks.0": "cpu"}
    )
    moments = input_moments(loaded, batches)
    assert set(moments) == set(wanted)
    torch.testing.assert_close(moments["blocks.0.up.weight"], wanted["blocks.0.up.weight"], rtol=1e-4, atol=1e-6)


def test_experts_in_matrices_have_none_because_one_of_them_is_multiplied_from_the_other_side():
    moments = input_moments(mixture("DbrxForCausalLM"), [torch.arange(9)[None]])
    assert len(moments) == 7  # three linears in each of two blocks, and the head
    assert [name for name in moments if "experts" in name] == []
