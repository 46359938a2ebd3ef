"""fit: the budget is kept to the byte, the choice follows what a weight does, and the model is left alone."""

import dataclasses

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F

import bigq
from one_weight import Holder

NF4, INT8 = bigq.NF4(), bigq.Int8()


def loaded(model, fit):
    return bigq.load_and_quantize_model(model, None, fit.config, "cpu")


def formats_of(model):
    return {
        name: module.descriptions["weight"].format
        for name, module in model.named_modules()
        if isinstance(module, bigq.QuantizedModule)
    }


def chosen(fit):
    return {weight.name: weight.format for weight in fit.weights}


def test_the_budget_is_kept_to_the_byte(tiny):
    """Over all budgets from the smallest choice to everything kept."""
    model = tiny(width=64, blocks=2)
    sizes = bigq.fit(model, bits=5.0)
    low, high = sizes.curve[0].nbytes, sizes.curve[-1].nbytes
    before = None
    for nbytes in range(low, high, (high - low) // 6):
        found = bigq.fit(model, max_bytes=nbytes)
        assert found.nbytes <= nbytes
        assert bigq.memory_footprint(loaded(tiny(width=64, blocks=2), found)).total_nbytes == found.nbytes
        assert before is None or found.error <= before.error
        before = found
    assert before.error < 1e-6 < bigq.fit(model, max_bytes=low).error
    assert bigq.fit(model, max_bytes=low).nbytes == low
    with pytest.raises(bigq.PlacementError, match=f"max_bytes={low - 1} is too little.* takes {low:,} bytes"):
        bigq.fit(model, max_bytes=low - 1)
    with pytest.raises(bigq.ConfigError, match=f"holds the model as it is .{high:,} bytes.: there is nothing to"):
        bigq.fit(model, max_bytes=high)


def test_bits_are_those_of_codes_and_scales(tiny):
    model = tiny(width=64, blocks=2)
    assert bigq.fit(model, bits=4.5).bits == 4.5
    assert 6 < bigq.fit(model, bits=7).bits <= 7
    with pytest.raises(bigq.PlacementError, match=r"bits=4.25 is too little.* takes 4.5 bits a weight"):
        bigq.fit(model, bits=4.25)
    with pytest.raises(bigq.ConfigError, match=r"bits=32 holds the model as it is .32 bits."):
        bigq.fit(model, bits=32)
    smaller = bigq.fit(model, bits=4.25, formats=[bigq.NF4(double_quant=True), "int8"])
    assert 4.1 < smaller.bits <= 4.25


def test_memory_of_gpus_is_summed(tiny):
    model = tiny()
    given = bigq.fit(model, max_memory={0: "40KB", 1: 60_000, "cpu": "1GB"})
    assert given == bigq.fit(model, max_bytes=100_000)


class Branches(nn.Module):
    """Four linears of one size: one gets no input, one has no influence, and one has ten times that of the other."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 64)
        self.idle, self.unused, self.weak, self.strong = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.head = nn.Linear(64, 30)
        with torch.no_grad():
            for linear in (self.unused, self.weak, self.strong):
                linear.weight.copy_(self.idle.weight)

    def forward(self, ids):
        x = self.embed(ids)
        self.unused(x)
        return self.head(self.idle(0 * x) + 0.1 * self.weak(x) + self.strong(x))


def test_sensitivities_are_known():
    found = bigq.fit(Branches(), bits=6)
    of = {weight.name: [cost.sensitivity for cost in weight.costs] for weight in found.weights}
    assert of["idle.weight"] == of["unused.weight"] == [0.0, 0.0, 0.0]
    assert of["strong.weight"][0] > of["strong.weight"][1] > of["strong.weight"][2] == 0.0
    # ten times the gradients are a hundred times the divergence, but for the samples of tokens
    assert of["strong.weight"][0] / of["weak.weight"][0] == pytest.approx(100, rel=0.2)
    assert chosen(found)["strong.weight"] in (INT8, None)
    assert chosen(found)["idle.weight"] == chosen(found)["unused.weight"] == NF4
    assert found.error == pytest.approx(sum(weight.costs[weight.chosen].sensitivity for weight in found.weights))


def test_relative_output_errors_need_no_logits():
    model = Branches()
    found = bigq.fit(nn.Sequential(model.embed, model.strong, nn.ReLU(), model.weak), bits=6, sensitivity="output")
    of = {weight.name: weight.costs[0].sensitivity for weight in found.weights}
    assert of["1.weight"] == pytest.approx(0.092**2, rel=0.2)  # NF4 of a uniform weight, and inputs without outliers


def test_it_is_deterministic_and_seeded(tiny):
    model = tiny()
    first = bigq.fit(model, bits=6)
    torch.manual_seed(123)
    assert bigq.fit(model, bits=6) == first
    assert bigq.fit(model, bits=6, seed=1).error != first.error


def test_batches_of_the_user(tiny):
    ids = torch.arange(40).view(2, 20)
    own = bigq.fit(tiny(), bits=6, batches=[ids, (ids[:1],), {"ids": ids}])
    assert own.error > 0
    assert own.error != bigq.fit(tiny(), bits=6).error


def test_a_config_keeps_its_settings_and_rules(tiny):
    config = bigq.QuantizationConfig(
        "fp4", rules={"head": "int8", "blocks.0.up": None}, compute_dtype="bf16", skip_modules=["blocks.1"]
    )
    found = bigq.fit(tiny(), bits=6, config=config)
    assert list(chosen(found)) == ["blocks.0.down.weight", "blocks.2.up.weight", "blocks.2.down.weight"]
    assert found.rules[:2] == config.ordered_rules()
    assert dataclasses.replace(found.config, format=config.format, rules=config.rules) == config
    formats = formats_of(loaded(tiny(), found))
    assert formats.pop("head") == INT8
    assert formats == {name.removesuffix(".weight"): f for name, f in chosen(found).items() if f is not None}


def test_a_search_that_no_chosen_format_would_do_is_left_out(tiny):
    """Its moments are of a weight that gets int8; a weight with a rule keeps its search."""
    model = tiny(width=64, blocks=2)
    first = bigq.fit(model, bits=4.5).weights[0].name
    moments = bigq.InputMoments({first: torch.rand(64) ** 30})  # so NF4 is bad for it
    config = bigq.QuantizationConfig("nf4", method="search", moments=moments)
    found = bigq.fit(model, bits=7, config=config)
    assert (chosen(found)[first], found.config.method, found.config.moments) == (INT8, "absmax", None)
    assert NF4 in chosen(found).values()
    assert formats_of(loaded(tiny(width=64, blocks=2), found)).keys() == {
        n.removesuffix(".weight") for n in chosen(found)
    }

    ruled = dataclasses.replace(config, rules={first: NF4})
    found = bigq.fit(model, bits=20, config=ruled, formats=["int8", None])
    assert (found.config.method, found.config.moments) == ("search", moments)


def test_searched_scales_are_what_is_measured(tiny):
    model = tiny()
    moments = bigq.input_moments(model)
    config = bigq.QuantizationConfig("nf4", method="search", moments=moments)
    found, plain = bigq.fit(model, bits=6, config=config), bigq.fit(model, bits=6)
    assert found.config.method == "search"
    assert found.uniform["nf4"].error < 0.95 * plain.uniform["nf4"].error
    assert found.uniform["int8"] == plain.uniform["int8"]
    assert bigq.memory_footprint(loaded(tiny(), found)).total_nbytes == found.nbytes
    every = bigq.fit(model, bits=8.5, formats=["nf4", "int8"], config=config)
    assert (every.config.weight_format(), every.config.method, every.config.moments) == (INT8, "absmax", None)


def test_a_rule_quantizes_nothing_that_is_kept_by_default():
    """Both linears are called "up"; the one that is tied is kept, and a rule "up" would quantize it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 50, bias=False)
            self.embed = nn.Embedding(50, 64)
            self.up.weight = self.embed.weight
            self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 64), "on": nn.Linear(64, 64)}) for _ in "ab")

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = torch.relu(10 * block["up"](x)) + 0.1 * block["on"](x)
            return self.up(x)

    found = bigq.fit(Model(), bits=6.5, formats=["nf4", "int8"])
    assert chosen(found) == {
        f"blocks.{b}.{name}.weight": INT8 if name == "up" else NF4 for b in range(2) for name in ("up", "on")
    }
    assert set(formats_of(loaded(Model(), found))) == {"blocks.0.up", "blocks.0.on", "blocks.1.up", "blocks.1.on"}


def test_tied_weights_are_one_weight(tiny):
    config = bigq.QuantizationConfig("nf4", also_quantize=["head"])
    found = bigq.fit(tiny(tied=True), bits=6, config=config, formats=["nf4", "int8"])
    assert [weight.name for weight in found.weights].count("embed.weight") == 1
    assert "head.weight" not in [weight.name for weight in found.weights]
    model = loaded(tiny(tied=True), found)
    assert bigq.memory_footprint(model).total_nbytes == found.nbytes
    assert formats_of(model)["embed"] == formats_of(model)["head"] == chosen(found)["embed.weight"]


def test_a_parameter_that_is_no_linear():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.matrix, self.head = nn.Embedding(40, 64), Holder(64, 64), nn.Linear(64, 40)

        def forward(self, ids):
            return self.head(self.embed(ids) @ self.matrix.weight)

    config = bigq.QuantizationConfig("nf4", also_quantize=["matrix", "embed"], skip_defaults=False)
    found = bigq.fit(Model(), bits=6, config=config, formats=["nf4", "int8"])
    assert sorted(chosen(found)) == ["embed.weight", "head.weight", "matrix.weight"]
    assert all(weight.costs[0].sensitivity > weight.costs[1].sensitivity > 0 for weight in found.weights)
    assert bigq.memory_footprint(loaded(Model(), found)).total_nbytes == found.nbytes


def test_the_model_is_as_before_after_an_error(tiny):
    model = tiny().train()
    model.head.weight.requires_grad_(False)
    with pytest.raises(IndexError):
        bigq.fit(model, bits=6, batches=[torch.tensor([[1, 2]]), torch.tensor([[999]])])
    assert model.training
    assert model.blocks[0].training
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["head.weight"]
    F.linear(torch.ones(1, 72), model.blocks[0].up.weight).sum().backward()
    assert model.blocks[0].up.weight.grad is not None


ARGUMENTS = {
    "no budget": ({}, "the budget is one of max_bytes, bits and max_memory; got none of them"),
    "two budgets": ({"max_bytes": 1, "bits": 5.0}, "got max_bytes and bits"),
    "words for bytes": ({"max_bytes": "twelve"}, "max_bytes is 'twelve'; expected bytes, or a string such as '12GiB'"),
    "no bytes": ({"max_bytes": 0}, "max_bytes is 0; expected bytes"),
    "half a byte": ({"max_bytes": 1.5}, "max_bytes is 1.5; expected bytes"),
    "bits as text": ({"bits": "5"}, "bits is '5'; expected a number of bits, such as 5.0"),
    "no bits": ({"bits": -1}, "bits is -1; expected a number"),
    "NaN bits": ({"bits": float("nan")}, "bits is nan; expected a number"),
    "no GPU": ({"max_memory": {"cpu": "1GB"}}, "names no GPU; expected"),
    "one format": ({"bits": 5, "formats": ["nf4", bigq.NF4()]}, "expected at least two to choose among"),
    "a format's name": ({"bits": 5, "formats": "nf4"}, r"formats is 'nf4'; expected a list of formats, such as"),
    "unknown format": ({"bits": 5, "formats": ["nf5", None]}, "format is 'nf5'; expected 'nf4', 'fp4' or 'int8'"),
    "unknown sensitivity": ({"bits": 5, "sensitivity": "hessian"}, r"expected one of \['kfac', 'output'\]"),
    "no tokens": ({"bits": 5, "tokens": 0}, "tokens is 0; expected a number of tokens, such as 256"),
    "no batches": ({"bits": 5, "batches": []}, "batches is empty"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_checked(tiny, name):
    arguments, message = ARGUMENTS[name]
    with pytest.raises(bigq.ConfigError, match=message):
        bigq.fit(tiny(), **arguments)


def test_models_that_cannot_be_measured_are_refused(tiny):
    with pytest.raises(bigq.UnsupportedError, match=r"6 modules of TinyModel are quantized: blocks\.0\.up.*before it"):
        bigq.fit(bigq.load_and_quantize_model(tiny(), None, "nf4", "cpu"), bits=5)
    with init_empty_weights():
        skeleton = tiny()
    with pytest.raises(bigq.UnsupportedError, match=r"6 weights of TinyModel are on meta.*load its float weights"):
        bigq.fit(skeleton, bits=6)
    with pytest.raises(bigq.UnsupportedError, match="nothing to quantize in LayerNorm"):
        bigq.fit(nn.LayerNorm(4), bits=6)
    model = Branches()
    model.weak = nn.Sequential(nn.Identity(), nn.Linear(64, 64))
    model.weak.forward = lambda x: x
    with pytest.raises(bigq.ConfigError, match=r"multiplied nothing by 1 of its weights on these.*weak\.1\.weight"):
        bigq.fit(model, bits=6)


@pytest.mark.gpu
def test_on_a_gpu_it_measures_as_on_the_cpu(tiny):
    model = tiny()
    for kind, near in (("output", 0.01), ("kfac", 0.5)):  # the labels that are sampled on a GPU are other ones
        on_cpu = bigq.fit(model.cpu().float(), bits=6, sensitivity=kind)
        for dtype in (torch.float32, torch.bfloat16):
            on_gpu = bigq.fit(model.to("cuda", dtype), bits=6, sensitivity=kind)
            for one, other in zip(on_gpu.weights, on_cpu.weights, strict=True):
                assert one.name == other.name
                small, large, _ = (cost.sensitivity for cost in one.costs)
                assert small == pytest.approx(other.costs[0].sensitivity, rel=max(near, 0.1 * (dtype != torch.float32)))
                assert small > 30 * large > 0
    model = bigq.load_and_quantize_model(model, None, on_gpu.config)
    assert bigq.memory_footprint(model).total_nbytes == on_gpu.nbytes
