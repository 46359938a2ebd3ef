"""Products with a quantized weight: they reach the kernel, and give what the dequantized weight gives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from bigq import NF4, Int8, UnsupportedError
from bigq.formats import Block4
from bigq.ops import eager
from one_weight import FORMATS, Holder, TransposedExperts, quantized


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def weight_format(request):
    return request.param


@pytest.fixture
def counted(monkeypatch):
    """How often the kernel of a linear was called, and how often a weight was dequantized outside of one."""
    counts = {"linear": 0, "dequantize": 0}

    def count(owner, name, key):
        original = getattr(owner, name)

        def function(*args, **kwargs):
            counts[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, function)

    count(eager, "linear", "linear")
    count(eager, "routed", "linear")
    count(Block4, "dequantize", "dequantize")
    count(Int8, "dequantize", "dequantize")
    return counts


def assert_near(got, expected, weight_format, case=""):
    """Int8 quantizes the activations too."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), case
    assert (got - expected).norm() <= (0.02 if weight_format.name == "int8" else 1e-5) * expected.norm(), case


# The weight [N, K] of a linear, and [K, N] of a Conv1D; x is [M, K]. Square ones show a dimension that is mixed up.

CASES = {"square": ((9, 9), NF4()), **{name: ((7, 71), weight_format) for name, weight_format in FORMATS.items()}}
LINEAR_PRODUCTS = [
    "F.linear(x, w)", "F.linear(x, w, b)", "F.linear(input=x, weight=w, bias=b)", "F.linear(x[0], w)",
    "F.linear(x[None], w)", "x @ w.T", "x @ w.mT", "x @ w.t()", "torch.matmul(x, w.T)", "x.matmul(w.transpose(0, 1))",
    "x[0] @ w.T", "x[None] @ w.T", "torch.mm(x, w.T)", "x.mm(w.transpose(-1, -2))", "torch.addmm(b, x, w.T)",
    "b.addmm(x, w.T)", "F.linear(x, w[2:6])", "F.linear(x, w.chunk(2)[1])", "x @ w[1:4].T", "F.linear(x, w.T.T)",
    "F.linear(x, w.split([2, len(w) - 2])[1], b[2:])", "x.double().matmul(w.double().T).float()",
]  # fmt: skip
CONV1D_PRODUCTS = [
    "torch.addmm(b, x, w)", "torch.addmm(input=b, mat1=x, mat2=w)", "x @ w", "x[None] @ w", "x[0] @ w",
    "torch.mm(x, w)", "F.linear(x, w.T, b)", "F.linear(x, w.mT)", "torch.matmul(x, w)",
]  # fmt: skip


def evaluate(expression, **names):
    return eval(expression, {"torch": torch, "F": F, **names})


def assert_one_call(expression, layer, shape, counted, case):
    """A linear or a Conv1D multiplies by its own kernel, once, and what comes out is near."""
    x, bias, dense = torch.randn(3, shape[1]), torch.randn(shape[0]), layer.weight.dequantize()
    counted.update(linear=0, dequantize=0)
    got = evaluate(expression, x=x, w=layer.weight, b=bias)
    assert counted == {"linear": 1, "dequantize": 0}, case
    assert_near(got, evaluate(expression, x=x, w=dense, b=bias), layer.format, case)


@pytest.mark.parametrize("expression", LINEAR_PRODUCTS)
def test_a_product_with_a_linear_weight_is_one_call_of_the_kernel(expression, counted):
    for case, (shape, weight_format) in CASES.items():
        layer = quantized(nn.Linear(shape[1], shape[0]), weight_format)
        assert_one_call(expression, layer, shape, counted, case)


@pytest.mark.parametrize("expression", CONV1D_PRODUCTS)
def test_a_product_with_a_conv1d_weight_is_one_call_of_the_kernel(expression, counted):
    for case, (shape, weight_format) in CASES.items():
        layer = quantized(Conv1D(*shape), weight_format)
        assert tuple(layer.weight.shape) == (shape[1], shape[0])
        assert_one_call(expression, layer, shape, counted, case)


EXPERT_PRODUCTS = [
    "torch.bmm(x, w.mT)", "torch.bmm(x, w.transpose(1, 2))", "x @ w.transpose(-2, -1)", "torch.matmul(x, w.mT)",
    "x.bmm(w.mT)", "torch.bmm(w, x.mT)", "w @ x.mT", "w.bmm(x.transpose(1, 2))",
]  # fmt: skip
TRANSPOSED_EXPERT_PRODUCTS = [
    "torch.bmm(x, w)", "x @ w", "torch.matmul(x, w)", "x.bmm(w)", "torch.bmm(w.mT, x.mT)", "w.mT @ x.mT",
]  # fmt: skip


@pytest.mark.parametrize(
    "expression, make",
    [
        *[pytest.param(expression, Holder, id=expression) for expression in EXPERT_PRODUCTS],
        *[pytest.param(expression, TransposedExperts, id=expression) for expression in TRANSPOSED_EXPERT_PRODUCTS],
    ],
)
def test_a_batched_product_is_one_call_of_the_kernel(expression, make, counted):
    for case, (size, weight_format) in CASES.items():
        module = quantized(make(3, *(size if make is Holder else size[::-1])), weight_format)
        x, dense = torch.randn(3, 5, size[1]), module.weight.dequantize()
        counted.update(linear=0, dequantize=0)
        got = evaluate(expression, x=x, w=module.weight)
        assert counted == {"linear": 1, "dequantize": 0}, case
        assert_near(got, evaluate(expression, x=x, w=dense), weight_format, case)


def test_one_of_the_experts_is_multiplied_by_the_kernel(weight_format, counted):
    module = quantized(Holder(3, 6, 70), weight_format)
    x, dense = torch.randn(5, 70), module.weight.dequantize()
    for expert in ("w[1]", "w[-1]", "w[torch.tensor(2)]", "w.unbind()[0]", "list(w)[2]", "w[1:][0]"):
        counted.update(linear=0, dequantize=0)
        got = F.linear(x, evaluate(expert, w=module.weight))
        assert counted == {"linear": 1, "dequantize": 0}, expert
        assert_near(got, F.linear(x, evaluate(expert, w=dense)), weight_format, expert)


def test_a_grouped_product_multiplies_each_row_by_its_expert(weight_format, counted):
    module = quantized(Holder(3, 6, 70), weight_format)
    x, dense = torch.randn(9, 70), module.weight.dequantize()
    for stops in ([2, 2, 9], [0, 0, 9], [3, 6, 9], [9, 9, 9], [1, 4, 7]):
        counted.update(linear=0, dequantize=0)
        got = F.grouped_mm(x, module.weight.transpose(-2, -1), offs=torch.tensor(stops, dtype=torch.int32))
        ranges = list(zip([0, *stops[:-1]], stops, strict=True))
        assert counted == {"linear": 1, "dequantize": 0}, stops
        expected = torch.cat([x[a:b] @ dense[e].T for e, (a, b) in enumerate(ranges)])
        assert_near(got[: stops[-1]], expected, weight_format, stops)


class OneByOne(Int8):
    """A format without products of stacks."""

    has_stack_products = False


def test_a_format_without_products_of_stacks_multiplies_by_one_weight_at_a_time(counted):
    module = quantized(Holder(3, 6, 70), OneByOne())
    x, dense = torch.randn(9, 70), module.weight.dequantize()
    counted.update(linear=0, dequantize=0)
    got = F.grouped_mm(x, module.weight.mT, offs=torch.tensor([2, 2, 8], dtype=torch.int32))
    batched = torch.bmm(x.view(3, 3, 70), module.weight.mT)
    assert counted == {"linear": 2 + 3, "dequantize": 0}
    assert_near(got, torch.cat([x[:2] @ dense[0].T, x[2:8] @ dense[2].T, torch.zeros(1, 6)]), OneByOne())
    assert_near(batched, torch.bmm(x.view(3, 3, 70), dense.mT), OneByOne())


@pytest.mark.parametrize("shape", [(3,), (2, 5), (), (0,)], ids=str)
def test_an_embedding_decodes_the_rows_it_is_asked_for(shape, weight_format, monkeypatch):
    module = quantized(nn.Embedding(50, 71), weight_format)
    ids, dense = torch.randint(0, 50, shape), module.weight.dequantize()
    rows = []

    def spy(kind):
        original = kind.dequantize

        def dequantize(self, state, shape, dtype):
            rows.append(shape[0])
            return original(self, state, shape, dtype)

        monkeypatch.setattr(kind, "dequantize", dequantize)

    spy(Block4)
    spy(Int8)
    for got in (module(ids), F.embedding(ids, module.weight), module.weight[ids]):
        assert torch.equal(got, dense[ids])
    assert rows == [ids.numel()] * 3


def test_an_embedding_with_a_padding_index_and_a_dtype(weight_format):
    module = quantized(nn.Embedding(50, 71, padding_idx=3), weight_format).to(torch.bfloat16)
    out = module(torch.tensor([3, 4]))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, module.weight.dequantize()[[3, 4]])
    assert out[0].count_nonzero() == 0  # as nn.Embedding initializes the padding row


def test_an_embedding_with_a_largest_norm_is_refused(weight_format):
    module, ids = quantized(nn.Embedding(50, 71), weight_format), torch.tensor([3, 4])
    before = module.weight.dequantize()
    module.max_norm = 1.0  # set after the load, which refuses it
    for call in (lambda: module(ids), lambda: F.embedding(ids, module.weight, max_norm=1.0)):
        with pytest.raises(UnsupportedError, match=r"max_norm=1\.0 renormalizes .* this one, \[50, 71\], is quantized"):
            call()
    assert torch.equal(module.weight.dequantize(), before)


def test_products_that_no_kernel_has_use_the_dequantized_weight(weight_format):
    layer = quantized(nn.Linear(71, 9), weight_format)
    x, dense, v = torch.randn(9, 71), layer.dequantize(), torch.randn(71)
    for expression in (
        "w @ v",
        "torch.mv(w, v)",
        "x.T @ w",
        "torch.einsum('mk,nk->mn', x, w)",
        "torch.addmm(b, x, w.T, beta=0.5, alpha=2.0)",
        "torch.addmm(b[:, None], x, w.T)",
        "torch.tensordot(x, w, dims=([1], [1]))",
        "w @ w.T",
        "F.linear(w, w)",
        "torch.matmul(x, w.T, out=torch.empty(9, 9))",
    ):
        names = {"x": x, "v": v, "b": torch.ones(9)}
        expected = evaluate(expression, w=dense, **names)
        assert torch.equal(evaluate(expression, w=layer.weight, **names), expected), expression


def test_a_product_of_no_rows_has_none(weight_format):
    layer = quantized(nn.Linear(71, 9), weight_format)
    experts = quantized(Holder(3, 6, 70), weight_format)
    assert F.linear(torch.empty(0, 71), layer.weight).shape == (0, 9)
    assert (torch.empty(2, 0, 71) @ layer.weight.T).shape == (2, 0, 9)
    assert torch.bmm(torch.empty(3, 0, 70), experts.weight.mT).shape == (3, 0, 6)
    assert F.linear(torch.ones(2, 71), layer.weight[3:3]).shape == (2, 0)
    assert torch.bmm(torch.empty(0, 5, 70), experts.weight[1:1].mT).shape == (0, 5, 6)


@pytest.mark.parametrize("expression", ["F.linear(x, w)", "x @ w.T", "torch.mm(x, w.T)", "w(x)"])
def test_integers_and_other_widths_are_refused(expression):
    for weight_format in FORMATS.values():
        layer = quantized(nn.Linear(71, 9), weight_format)
        names = {"w": layer if expression == "w(x)" else layer.weight}
        with pytest.raises(UnsupportedError, match=r"activations of torch\.int64"):
            evaluate(expression, x=torch.ones(2, 71, dtype=torch.int64), **names)
        for width in (70, 72, 9):
            with pytest.raises((UnsupportedError, RuntimeError)):
                evaluate(expression, x=torch.ones(2, width), **names)


@pytest.mark.parametrize("expression", [*LINEAR_PRODUCTS, "torch.einsum('mk,nk->mn', x, w)", "x * w[0]"])
def test_gradients_reach_activations_and_biases(expression):
    layer = quantized(nn.Linear(71, 7), NF4())
    grads = []
    x, bias = torch.randn(3, 71), torch.randn(7)
    for weight in (layer.weight, layer.dequantize()):
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        out = evaluate(expression, x=leaves[0], w=weight, b=leaves[1])
        (out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*grads, strict=True):
        assert (got is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


GROUPED = "F.grouped_mm(x[0], w.mT, offs=torch.tensor([1, 1, 5], dtype=torch.int32))"


@pytest.mark.parametrize("expression", [*EXPERT_PRODUCTS, GROUPED])
def test_gradients_pass_through_batched_products(expression):
    for name, weight_format in FORMATS.items():
        module = quantized(Holder(3, 8, 72), weight_format)  # torch's own grouped_mm wants rows of 16 bytes
        x, grads = torch.randn(3, 5, 72), []
        for weight in (module.weight, module.weight.dequantize()):
            leaf = x.clone().requires_grad_()
            out = evaluate(expression, x=leaf, w=weight)
            (out * out.detach()).sum().backward()
            grads.append(leaf.grad)
        near = 0.02 if name == "int8" else 1e-4  # int8 rounds what is multiplied
        assert (grads[0] - grads[1]).norm() <= near * grads[1].norm(), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_products_and_reads_work_without_gradients(mode, weight_format):
    layer = quantized(nn.Linear(71, 7), weight_format)
    x = torch.randn(3, 71)
    expected, dense = layer(x).detach(), layer.dequantize()
    with mode():
        assert torch.equal(F.linear(x, layer.weight, layer.bias), expected)
        assert torch.equal(layer.weight[1:3] + 0, dense[1:3])
        assert torch.equal(layer.weight.to(torch.float64) + 0, layer.dequantize(torch.float64))


@pytest.mark.parametrize("expression", ["F.linear(x, w, b)", "x @ w.T", "torch.addmm(b, x, w.T)", "w(x)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype_as_it_does_for_a_plain_weight(expression, dtype):
    layer = quantized(nn.Linear(71, 7), NF4())
    plain = nn.Linear(71, 7)
    x, bias = torch.randn(3, 71, dtype=dtype), torch.randn(7)
    with torch.no_grad():
        plain.weight.copy_(layer.dequantize())
        plain.bias.copy_(layer.bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = [
                evaluate(expression, x=x, b=bias, w=module if expression == "w(x)" else module.weight)
                for module in (layer, plain)
            ]
    assert got.dtype == expected.dtype
    assert (got.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


def test_the_compute_dtype_is_that_of_every_product():
    layer = quantized(nn.Linear(71, 7, bias=False), NF4(), compute_dtype=torch.bfloat16)
    x = torch.randn(3, 71)
    expected = layer(x)
    assert expected.dtype == torch.float32
    assert torch.equal(expected, expected.bfloat16().float())
    for expression in ("F.linear(x, w)", "x @ w.T", "torch.mm(x, w.T)"):
        assert torch.equal(evaluate(expression, x=x, w=layer.weight), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_vmap_over_activations(weight_format):
    layer = quantized(nn.Linear(71, 7), weight_format)
    x = torch.randn(4, 3, 71)
    got = torch.func.vmap(lambda rows: F.linear(rows, layer.weight, layer.bias))(x)
    assert_near(got, F.linear(x, layer.dequantize(), layer.bias), weight_format)
