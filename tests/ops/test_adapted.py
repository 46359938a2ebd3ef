"""A quantized product and an adapter in one node of autograd: at most the error of the same products one by one."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bigq import ops
from bigq.errors import UnsupportedError
from bigq.ops import eager
from bigq.ops.adapted import adapted_linear
from bigq.system.internals import SEES_EDITS, TELLS_HOOKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, K, RANK, SCALING = 48, 128, 8, 1.5
FORMATS = ["nf4", "nf4-double-quant", "int8"]
each_format = pytest.mark.parametrize("name", FORMATS)


def weight(name, bias=False):
    """The op, the state and the settings of a quantized weight, and the weight."""
    torch.manual_seed(0)
    dense = torch.randn(N, K, device=DEVICE) * 0.1
    bias = torch.randn(N, device=DEVICE, requires_grad=True) if bias else None
    if name == "int8":
        codes, absmax = ops.quantize_int8(dense)
        return "linear_int8", (codes, absmax, bias), (6.0,), ops.dequantize_int8(codes, absmax, torch.float32)
    packed, absmax = ops.quantize_4bit(dense, "nf4", 64)
    if name == "nf4":
        decoded = ops.dequantize_4bit(packed, absmax, "nf4", 64, K, torch.float32)
        return "linear_4bit", (packed, absmax, bias), (None, None, "nf4", 64, K), decoded
    nested = ops.quantize_absmax(absmax)
    decoded = ops.dequantize_4bit(packed, ops.dequantize_absmax(*nested), "nf4", 64, K, torch.float32)
    return "linear_4bit", (packed, nested[0], bias, *nested[1:]), ("nf4", 64, K), decoded


def factors(dtype=torch.float32):
    torch.manual_seed(1)
    down, up = torch.randn(RANK, K, device=DEVICE) * 0.1, torch.randn(N, RANK, device=DEVICE) * 0.3
    return down.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()


def activations(dtype=torch.float32, rows=12):
    return torch.randn(2, rows // 2, K, device=DEVICE).to(dtype).requires_grad_()


def one_by_one(op, x, down, up, dtype, state, settings):
    """What PEFT computes under autocast to `dtype`."""
    x = x.to(dtype)
    return eager.linear(op, x, state, settings) + F.linear(F.linear(x, down.to(dtype)), up.to(dtype)) * SCALING


def results(out, leaves, grad):
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def errors(found, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    "x_dtype, factor_dtype, dtype",
    [
        pytest.param(torch.float32, torch.float32, torch.float32, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, torch.bfloat16, id="bfloat16-and-float32-factors"),
        pytest.param(torch.float32, torch.float32, torch.bfloat16, id="bfloat16-of-float32"),
        pytest.param(torch.bfloat16, torch.bfloat16, torch.bfloat16, id="bfloat16"),
        pytest.param(torch.float16, torch.float32, torch.float16, id="float16-and-float32-factors"),
    ],
)
@each_format
def test_errors_are_at_most_those_of_the_products_one_by_one(name, x_dtype, factor_dtype, dtype):
    op, state, settings, dense = weight(name)
    (down, up), x, grad = factors(factor_dtype), activations(x_dtype, 256), torch.randn(2, 128, N, device=DEVICE)
    wide = [t.detach().double().requires_grad_() for t in (x, down, up)]
    exact = results(F.linear(wide[0], dense.double()) + SCALING * (wide[0] @ wide[1].mT) @ wide[2].mT, wide, grad)
    found = results(adapted_linear(op, x, down, up, SCALING, dtype, state, settings), (x, down, up), grad)
    apart = results(one_by_one(op, x, down, up, dtype, state, settings), (x, down, up), grad)
    assert [t.dtype for t in found] == [t.dtype for t in apart] == [dtype, x_dtype, factor_dtype, factor_dtype]
    rounding = 1e-7 if dtype == torch.float32 else 0.0  # sums in another order
    for error, allowed in zip(errors(found, exact), errors(apart, exact), strict=True):
        assert error <= 1.02 * allowed + rounding  # 256 rows: luck moves an error by less than 2 %


@each_format
def test_without_a_gradient_the_numbers_are_the_same_and_no_node_is_made(name):
    op, state, settings, _ = weight(name)
    (down, up), x = factors(), activations()
    out = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
    with torch.no_grad():
        plain = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
    assert plain.grad_fn is None
    assert torch.equal(out, plain)


@each_format
def test_the_bias_is_added_once_and_gets_its_gradient(name):
    op, state, settings, _ = weight(name, bias=True)
    (down, up), x, grad = factors(), activations(), torch.randn(2, 6, N, device=DEVICE)
    out = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
    without = adapted_linear(op, x, down, up, SCALING, torch.float32, (*state[:2], None, *state[3:]), settings)
    torch.testing.assert_close(out, without + state[2])
    (found,) = torch.autograd.grad(out, state[2], grad)
    torch.testing.assert_close(found, grad.sum(dim=(0, 1)))


def test_only_what_needs_a_gradient_gets_one():
    op, state, settings, _ = weight("nf4")
    expected = None
    for needed in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        torch.manual_seed(2)
        leaves = [t.detach().requires_grad_(n) for t, n in zip((activations(), *factors()), needed, strict=True)]
        x, down, up = leaves
        adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(needed)
        expected = expected or [leaf.grad for leaf in leaves]
        assert all(leaf.grad is None or torch.equal(leaf.grad, e) for leaf, e in zip(leaves, expected, strict=True))


def test_gradients_of_gradients_are_refused_in_words():
    op, state, settings, _ = weight("nf4")
    (down, up), x = factors(), activations()
    out = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
    with pytest.raises(UnsupportedError, match=r"create_graph=True.*unfuse_lora"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@each_format
def test_a_batch_of_gradients_is_each_of_them(name):
    op, state, settings, _ = weight(name, bias=True)
    (down, up), x, grads = factors(), activations(), torch.randn(4, 2, 6, N, device=DEVICE)
    out, leaves = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings), (x, down, up, state[2])
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in grads]
    for found, expected in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_checkpointing_computes_again_what_it_did_not_keep(reentrant):
    op, state, settings, _ = weight("nf4-double-quant")
    found = []
    for is_kept in (True, False):
        torch.manual_seed(2)
        (down, up), x = factors(), activations()

        def block(x, down=down, up=up):
            return torch.tanh(adapted_linear(op, x * 2, down, up, SCALING, torch.bfloat16, state, settings))

        out = block(x) if is_kept else checkpoint(block, x, use_reentrant=reentrant)
        out.sum().backward()
        found.append([x.grad, down.grad, up.grad])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=["cast", "as-they-are"])
def test_hooks_of_others_see_all_that_a_node_needs(factor_dtype):
    op, state, settings, _ = weight("nf4")
    (down, up), x, saved = factors(factor_dtype), activations(torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = adapted_linear(op, x, down, up, SCALING, torch.bfloat16, state, settings)
    inner, is_cast = 12 * RANK, factor_dtype == torch.float32
    own = [inner + RANK * (K + N)] if is_cast else [inner, down.numel(), up.numel()]
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), *own, *(t.numel() for t in state[:2])])
    expected = torch.autograd.grad(out.sum(), (x, down, up))
    again = adapted_linear(op, x, down, up, SCALING, torch.bfloat16, state, settings)
    assert all(map(torch.equal, torch.autograd.grad(again.sum(), (x, down, up)), expected))


def test_hooks_may_be_methods_of_torch():
    op, state, settings, _ = weight("nf4")
    (down, up), x, found = factors(), activations(), []
    for pack in (lambda t: t.cpu(), torch.Tensor.cpu):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to(DEVICE)):
            out = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
        found.append(torch.autograd.grad(out.sum(), (x, down, up)))
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(not TELLS_HOOKS, reason="autograd saves all where its hooks are not known")
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=["cast", "as-they-are"])
def test_checkpointing_computes_again_two_tensors(factor_dtype, monkeypatch):
    """The input, and what the node computed. Parameters are kept."""
    op, state, settings, _ = weight("nf4")
    (down, up), x, packed = factors(factor_dtype), activations(torch.bfloat16), []
    init = torch.autograd.graph.saved_tensors_hooks.__init__

    def noting(self, pack, unpack):
        init(self, pack_hook=lambda t: packed.append(t.shape) or pack(t), unpack_hook=unpack)
        self.pack_hook.__module__ = pack.__module__

    monkeypatch.setattr(torch.autograd.graph.saved_tensors_hooks, "__init__", noting)
    out = checkpoint(adapted_linear, op, x, down, up, SCALING, torch.bfloat16, state, settings, use_reentrant=False)
    assert len(packed) == 2
    out.sum().backward()
    assert len(packed) == 4


@pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen")
@pytest.mark.parametrize("edited", ["codes", "factor"])
def test_a_parameter_that_is_written_after_the_forward_pass_is_an_error(edited):
    op, state, settings, _ = weight("nf4")
    (down, up), x = factors(torch.bfloat16), activations(torch.bfloat16)
    out = adapted_linear(op, x, down, up, SCALING, torch.bfloat16, state, settings)
    with torch.no_grad():
        (state[0] if edited == "codes" else up).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_input_that_is_written_after_the_forward_pass_is_an_error():
    op, state, settings, _ = weight("nf4")
    (down, up), x = factors(), activations().detach()
    out = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (3, 1, 2, K)], ids=str)
def test_any_number_of_leading_dimensions(shape):
    op, state, settings, dense = weight("nf4")
    (down, up), x = factors(), torch.randn(shape, device=DEVICE, requires_grad=True)
    out = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
    torch.testing.assert_close(out, x @ dense.mT + SCALING * (x @ down.mT) @ up.mT)
    out.sum().backward()  # a gradient with strides of 0
    assert x.grad.shape == x.shape
    torch.testing.assert_close(down.grad, SCALING * (up.sum(0)[:, None] * x.detach().reshape(-1, K).sum(0)))


def test_strided_inputs():
    op, state, settings, _ = weight("nf4")
    (down, up), x = factors(), torch.randn(K, 6, 2, device=DEVICE).permute(2, 1, 0).requires_grad_()
    grad = torch.randn(N, 6, 2, device=DEVICE).permute(2, 1, 0)
    leaves = (x, down, up)
    found = results(adapted_linear(op, x, *leaves[1:], SCALING, torch.float32, state, settings), leaves, grad)
    expected = results(one_by_one(op, x, *leaves[1:], torch.float32, state, settings), leaves, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_factor_written_past_the_sight_of_torch_is_seen_by_the_next_call():
    """As optimizers of bitsandbytes do: the version of the Parameter stays what it was."""
    op, state, settings, _ = weight("nf4")
    (down, up), x = factors(), activations(torch.bfloat16)
    up.data.zero_()
    plain = eager.linear(op, x, state, settings)
    assert torch.equal(adapted_linear(op, x, down, up, SCALING, torch.bfloat16, state, settings), plain)
    version = up._version
    up.data.fill_(1.0)
    assert up._version == version
    assert not torch.equal(adapted_linear(op, x, down, up, SCALING, torch.bfloat16, state, settings), plain)


def test_a_wrong_width_is_refused_by_the_op():
    op, state, settings, _ = weight("nf4")
    down, up = factors()
    with pytest.raises((RuntimeError, UnsupportedError), match="in_features"):
        adapted_linear(op, torch.randn(2, K + 1, device=DEVICE), down, up, SCALING, torch.float32, state, settings)


@each_format
def test_autocast_around_the_backward_pass_casts_no_product(name):
    """A launcher does not hear it and torch's products do: two dtypes would meet in one product on a GPU."""
    op, state, settings, _ = weight(name, bias=True)
    (down, up), x = factors(), activations()
    found = []
    for enabled in (False, True):
        out = adapted_linear(op, x, down, up, SCALING, torch.float32, state, settings)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out.square().sum(), (x, down, up, state[2])))
    assert all(map(torch.equal, *found))
