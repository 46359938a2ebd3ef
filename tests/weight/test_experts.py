"""Fused experts: the forward with products of stacks computes what transformers computes with dequantized weights."""

from importlib import import_module

import pytest
import torch

import bigq
from bigq.errors import UnsupportedError
from bigq.ops import eager
from bigq.ops.token_rows import Gate
from bigq.system.internals import calls_only_forward
from bigq.testing import assert_within_budget
from bigq.weight.experts import QuantizedExperts

FORMATS = (bigq.NF4(), bigq.NF4(double_quant=True), bigq.FP4(block_size=32), bigq.Int8())
CLASSES = {  # module, class and config of transformers
    "mixtral": ("mixtral", "MixtralExperts", "MixtralConfig"),
    "gpt-oss": ("gpt_oss", "GptOssExperts", "GptOssConfig"),  # transposed, interleaved, with biases
    "nemotron-h": ("nemotron_h", "NemotronHExperts", "NemotronHConfig"),  # without a gate
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig"),
}
E, TOP_K, H, INNER = 16, 2, 64, 96


def experts_of(name, implementation="grouped_mm"):
    module, kind, config = CLASSES[name]
    pytest.importorskip("transformers")
    configs = import_module(f"transformers.models.{module}.configuration_{module}")
    kinds = import_module(f"transformers.models.{module}.modeling_{module}")
    if not hasattr(kinds, kind):
        pytest.skip(f"this transformers has no {kind}")
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    config = getattr(configs, config)(
        hidden_size=H, intermediate_size=INNER, moe_intermediate_size=INNER, **dict.fromkeys(names, E)
    )
    config._experts_implementation = implementation
    experts = getattr(kinds, kind)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return experts


def quantized(experts, weight_format):
    model = torch.nn.Sequential(experts)
    config = bigq.QuantizationConfig(weight_format)
    return bigq.load_and_quantize_model(model, None, config, device_map="cpu")[0]


def inputs(tokens, dtype=torch.float32):
    x = torch.randn(tokens, H, dtype=dtype)
    ids = torch.stack([torch.randperm(E)[:TOP_K] for _ in range(tokens)])
    return x, ids, torch.rand(tokens, TOP_K, dtype=dtype)


def dense_output(name, module, arguments, implementation="grouped_mm"):
    plain = experts_of(name, implementation)
    for leaf in module.descriptions:
        with torch.no_grad():
            getattr(plain, leaf).copy_(getattr(module, leaf).dequantize())
    for leaf, parameter in module.named_parameters():
        if leaf.endswith("_bias"):
            with torch.no_grad():
                getattr(plain, leaf).copy_(parameter)
    return plain(*arguments)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_output_is_that_of_the_dequantized_experts(name, implementation):
    for weight_format in FORMATS:
        module = quantized(experts_of(name, implementation), weight_format)
        assert isinstance(module, QuantizedExperts)
        for tokens in (1, 2, 19):
            arguments = inputs(tokens)
            got, expected = module(*arguments), dense_output(name, module, arguments)
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            limit = 0.02 if weight_format.name == "int8" else 1e-5  # int8 quantizes the activations too
            assert (got - expected).norm() <= limit * expected.norm(), (weight_format, tokens)


@pytest.fixture
def calls(monkeypatch):
    seen, original = [], eager.routed

    def routed(name, *args):
        seen.append(name)
        return original(name, *args)

    monkeypatch.setattr(eager, "routed", routed)
    return seen


BOTH = pytest.mark.parametrize("weight_format", [bigq.NF4(), bigq.Int8()], ids=lambda one: one.name)


@BOTH
def test_few_rows_are_not_sorted(weight_format, calls):
    module, bits = quantized(experts_of("mixtral"), weight_format), "int8" if weight_format.name == "int8" else "4bit"
    for tokens, kind in ((1, "routed"), (2, "routed"), (3, "grouped")):
        calls.clear()
        module(*inputs(tokens))
        assert calls == [f"{kind}_linear_{bits}"] * 2


@BOTH
def test_an_expert_that_does_not_exist_adds_nothing(weight_format):
    module = quantized(experts_of("gpt-oss"), weight_format)
    for tokens in (1, 9):
        x, ids, weights = inputs(tokens)
        everywhere = module(x, ids, weights)
        ids_of_others = torch.cat([ids, torch.full_like(ids, E)], dim=1)
        torch.testing.assert_close(module(x, ids_of_others, torch.cat([weights, weights], dim=1)), everywhere)
        ids_of_others[:, TOP_K:] = -1
        torch.testing.assert_close(module(x, ids_of_others, torch.cat([weights, weights], dim=1)), everywhere)


@BOTH
@pytest.mark.parametrize("tokens", [1, 19])
def test_weights_may_be_of_another_shape_as_in_transformers(tokens, weight_format):
    module, (x, ids, weights) = quantized(experts_of("mixtral"), weight_format), inputs(tokens)
    expected = module(x, ids, weights)
    for shape in ((-1,), (tokens, TOP_K, 1)):
        assert torch.equal(module(x, ids, weights.view(shape)), expected)


@BOTH
@pytest.mark.parametrize("tokens", [1, 19])
def test_rows_experts_and_weights_of_different_numbers_are_refused(tokens, weight_format):
    module, (x, ids, weights) = quantized(experts_of("mixtral"), weight_format), inputs(tokens)
    twice = [ids.repeat(2, 1), weights.repeat(2, 1)]
    for arguments in ((x, *twice), (x, ids, twice[1]), (x, ids, weights.repeat(1, 2))):
        with pytest.raises(UnsupportedError, match=r"expected \[T, H\], \[T, top_k\] and \[T, top_k\]"):
            module(*arguments)


def test_arguments_may_have_the_names_that_transformers_has_for_them():
    arguments = inputs(3)
    for implementation, names in (
        ("grouped_mm", ("top_k_index", "top_k_weights")),
        ("eager", ("router_indices", "routing_weights")),  # of the forward of GptOssExperts
    ):
        module = quantized(experts_of("gpt-oss", implementation), bigq.NF4())
        named = dict(zip(names, arguments[1:], strict=True))
        assert torch.equal(module(hidden_states=arguments[0], **named), module(*arguments))


def test_no_token_and_no_expert_of_a_token_give_zeros_and_gradients():
    for name in ("gpt-oss", "nemotron-h"):
        module = quantized(experts_of(name), bigq.NF4())
        for tokens, top_k in ((0, TOP_K), (3, 0)):
            x = torch.randn(tokens, H, requires_grad=True)
            ids, weights = torch.zeros(tokens, top_k, dtype=torch.int64), torch.rand(tokens, top_k, requires_grad=True)
            out = module(x, ids, weights)
            assert torch.equal(out, torch.zeros(tokens, H))
            out.sum().backward()
            assert torch.equal(x.grad, torch.zeros(tokens, H))
            assert weights.grad.shape == (tokens, top_k)


def test_a_class_with_a_forward_of_its_own_keeps_it():
    fused = type(experts_of("mixtral"))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * fused.forward(self, hidden_states, top_k_index, top_k_weights)

    module = experts_of("mixtral")
    module.__class__ = type("TwiceMixtralExperts", (fused,), {"forward": forward})
    module = quantized(module, bigq.NF4())
    assert not isinstance(module, QuantizedExperts)
    for tokens in (1, 19):
        arguments = inputs(tokens)
        torch.testing.assert_close(module(*arguments), 2 * dense_output("mixtral", module, arguments))


@pytest.mark.parametrize("weight_format", [bigq.NF4(double_quant=True), bigq.Int8()], ids=lambda one: one.name)
def test_gradients_are_those_of_the_dequantized_experts(weight_format):
    module = quantized(experts_of("gpt-oss"), weight_format)
    limit = 0.02 if weight_format.name == "int8" else 1e-5  # int8 rounds what is multiplied
    for tokens in (1, 9):
        x, ids, weights = inputs(tokens)
        grads = []
        for forward in (module, lambda *arguments: dense_output("gpt-oss", module, arguments)):
            leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
            forward(leaves[0], ids, leaves[1]).square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for got, expected in zip(*grads, strict=True):
            assert (got - expected).norm() <= limit * expected.norm(), tokens


@pytest.mark.parametrize("weight_format", [bigq.NF4(double_quant=True), bigq.Int8()], ids=lambda one: one.name)
def test_forward_mode_is_that_of_the_dequantized_experts(weight_format):
    module = quantized(experts_of("gpt-oss"), weight_format)
    limit = 0.02 if weight_format.name == "int8" else 1e-4  # the gate's slope is that of rounded numbers
    bias = module.down_proj_bias.detach()

    def change_of(forward, primal, tangent):
        return torch.func.jvp(forward, (primal,), (tangent,))[1]

    for tokens in (1, 9):
        x, *routes = inputs(tokens)
        dx, dbias = torch.randn_like(x), torch.randn_like(bias)

        def dense(x, routes=routes):
            return dense_output("gpt-oss", module, (x, *routes), "eager")

        def of_bias(bias, x=x, routes=routes):
            return torch.func.functional_call(module, {"down_proj_bias": bias}, (x, *routes))

        got = change_of(lambda x, routes=routes: module(x, *routes), x, dx)
        expected = change_of(dense, x, dx)
        assert (got - expected).norm() <= limit * expected.norm()
        expected = (dbias[routes[0]] * routes[1][..., None]).sum(dim=1)  # the output is linear in the last bias
        torch.testing.assert_close(change_of(of_bias, bias, dbias), expected)


def test_autocast_and_bfloat16_decide_the_dtype_as_for_linears():
    module = quantized(experts_of("mixtral"), bigq.NF4())
    x, ids, weights = inputs(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x, ids, weights)
    assert got.dtype == torch.float32
    expected = module(x, ids, weights)
    assert 0 < (got - expected).norm() < 0.02 * expected.norm()
    assert module(x.bfloat16(), ids, weights.bfloat16()).dtype == torch.bfloat16


@BOTH
def test_compiled_experts_use_the_products_without_a_break(weight_format):
    module = quantized(experts_of("mixtral"), weight_format)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for tokens in (1, 19):
        arguments = inputs(tokens)
        torch.testing.assert_close(compiled(*arguments), module(*arguments))


@pytest.mark.skipif(not calls_only_forward(torch.nn.Identity()), reason="this torch does not tell who hears a call")
def test_gates_are_known_by_their_numbers():
    silu, clamped = Gate("silu"), Gate("clamped", 1.702, 7.0)
    for name, expected in (("mixtral", silu), ("qwen3-moe", silu), ("gpt-oss", clamped)):
        module = quantized(experts_of(name), bigq.NF4())
        assert module._known_gate() == expected
        if expected == silu:
            module.act_fn = torch.nn.GELU()  # another one, so it is tried again
            assert module._known_gate() is None
            module.act_fn = torch.nn.SiLU()
            assert module._known_gate() == expected
            hook = module.act_fn.register_forward_hook(lambda *_: None)
            assert module._known_gate() is None  # the hook would not be called
            hook.remove()
            assert module._known_gate() == expected
            module._apply_gate = lambda x: x[:, ::2]
        else:
            module.limit = 6.0
            assert module._known_gate() == Gate("clamped", 1.702, 6.0)
            module.alpha = torch.tensor(1.702)
        assert module._known_gate() is None


@pytest.mark.skipif(not calls_only_forward(torch.nn.Identity()), reason="this torch does not tell who hears a call")
def test_gates_are_known_whatever_the_default_dtype():
    modules = {name: quantized(experts_of(name), bigq.NF4()) for name in ("mixtral", "gpt-oss")}
    try:
        torch.set_default_dtype(torch.bfloat16)
        kinds = {name: getattr(module._known_gate(), "kind", None) for name, module in modules.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert kinds == {"mixtral": "silu", "gpt-oss": "clamped"}


@pytest.mark.skipif(not calls_only_forward(torch.nn.Identity()), reason="this torch does not tell who hears a call")
def test_a_gate_is_tried_again_when_a_number_has_changed_under_any_name():
    def apply_gate(x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=module.swiglu_limit)) * up

    module = quantized(experts_of("mixtral"), bigq.NF4())
    module.swiglu_limit, module._apply_gate = float("inf"), apply_gate
    assert module._known_gate() == Gate("silu")
    module.swiglu_limit = 7.0
    assert module._known_gate() is None
    module.swiglu_limit = float("inf")
    assert module._known_gate() == Gate("silu")


@pytest.mark.skipif(not calls_only_forward(torch.nn.Identity()), reason="this torch does not tell who hears a call")
def test_a_gate_that_may_read_what_is_not_compared_is_not_known():
    module = quantized(experts_of("mixtral"), bigq.NF4())
    module.offset = torch.zeros(())  # may be changed in place
    assert module._known_gate() is None
    module = quantized(experts_of("mixtral"), bigq.NF4())
    module._apply_gate = lambda x: torch.nn.functional.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]
    assert module._known_gate() == Gate("silu")
    module.config.gain = 1.0
    module._apply_gate = lambda x: module.config.gain * type(module)._apply_gate(module, x)
    assert module._known_gate() is None


def _clamped_at(limit):
    def apply_gate(x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    return apply_gate


def _raises(x):
    raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")  # as a kernel of others


@pytest.mark.parametrize(
    "apply_gate",
    [
        *(pytest.param(_clamped_at(limit), id=f"clamped at {limit:g}") for limit in (10.0, 16.0, 100.0, 1e4)),
        pytest.param(_raises, id="takes no tensor of a CPU"),
    ],
)
def test_a_gate_that_is_another_one_is_not_known(apply_gate):
    """Those of Glm5Next and HYV4 clamp at `swiglu_limit` of the config."""
    module = quantized(experts_of("mixtral"), bigq.NF4())
    module._apply_gate = apply_gate
    assert module._known_gate() is None


def test_an_activation_that_does_more_than_its_class_is_called():
    module, heard = quantized(experts_of("mixtral"), bigq.NF4()), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: heard.append(1))
    try:
        assert module._known_gate() is None
    finally:
        handle.remove()
    module.act_fn.forward = torch.tanh
    assert module._known_gate() is None


def test_a_fake_tensor_of_a_gpu_tries_no_gate():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = quantized(experts_of("mixtral"), bigq.NF4())
    with FakeTensorMode():
        assert module._activated(torch.empty(4, 2 * INNER, device="cuda")).shape == (4, INNER)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_outputs_and_gradients_in_bfloat16_have_the_error_of_dequantized_experts(name):
    module = quantized(experts_of(name), bigq.NF4()).to("cuda", torch.bfloat16)
    plain = experts_of(name).cuda()
    for tokens in (1, 3, 50):
        slopes = torch.randn(tokens, H)
        arguments = inputs(tokens, torch.bfloat16)
        found = []
        for own, dtype in ((module, torch.bfloat16), (plain, torch.float32), (plain, torch.bfloat16)):
            own = own.to(dtype)
            for leaf, parameter in plain.named_parameters() if own is plain else ():
                dense = getattr(module, leaf)
                with torch.no_grad():
                    parameter.copy_(dense.dequantize() if leaf in module.descriptions else dense)
            x, ids, weights = (part.cuda() for part in arguments)
            x, weights = (part.to(dtype).requires_grad_() for part in (x, weights))
            out = own(x, ids, weights)
            found.append((out, *torch.autograd.grad(out, (x, weights), slopes.to("cuda", dtype))))
        for got, exact, baseline in zip(*found, strict=True):
            assert_within_budget(got, exact.double(), baseline)
