"""The node of autograd around an eager linear: the gradients are those of the op behind the dispatcher, bit for bit."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bigq import ops
from bigq.ops import eager, library, reference
from bigq.system.internals import SEES_EDITS, TELLS_LISTENERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Without a GPU, CPU tensors claim to be on one, and the reference plays the launchers."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr(library, "cuda_implementation", lambda name: getattr(reference, name))
        monkeypatch.setattr("bigq.ops.replays.MAX_TOKENS", 0)  # nothing to record


def cases():
    weight = torch.randn(48, 64, device=DEVICE)
    packed, absmax = ops.quantize_4bit(weight, "nf4", 32)
    bits = absmax.view(torch.int32)
    nested = ops.quantize_absmax(absmax)
    bias = torch.randn(48, device=DEVICE, requires_grad=True)
    return {
        "plain": ("linear_4bit", (packed, bits, bias), (None, None, "nf4", 32, 64)),
        "nested": ("linear_4bit", (packed, nested[0], bias, *nested[1:]), ("nf4", 32, 64)),
        "no-bias": ("linear_4bit", (packed, bits, None), (None, None, "nf4", 32, 64)),
        "int8": ("linear_int8", (*ops.quantize_int8(weight), bias), (6.0,)),
    }


CASES = ("plain", "nested", "no-bias", "int8")


def gradients(out, x, bias):
    leaves = [leaf for leaf in (x, bias) if leaf is not None]
    return torch.autograd.grad((out.float() ** 2).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_behind_the_dispatcher(name):
    op, state, settings = cases()[name]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 64, device=DEVICE).to(dtype).requires_grad_()
        got, expected = eager.linear(op, x, state, settings), getattr(library, op)(x, *state, *settings)
        assert (type(got.grad_fn).__name__ == "_LinearBackward") == TELLS_LISTENERS  # else all goes by the dispatcher
        assert torch.equal(got, expected)
        for mine, theirs in zip(gradients(got, x, state[2]), gradients(expected, x, state[2]), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def test_a_gradient_of_a_gradient_is_that_behind_the_dispatcher():
    op, state, settings = cases()["nested"]
    x, second = torch.randn(3, 64, device=DEVICE, requires_grad=True), []
    for linear in (lambda: eager.linear(op, x, state, settings), lambda: getattr(library, op)(x, *state, *settings)):
        (first,) = torch.autograd.grad(linear().square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.equal(*second)


def test_a_batch_of_gradients_is_each_of_them():
    for name in CASES:
        op, state, settings = cases()[name]
        x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
        out, grads = eager.linear(op, x, state, settings), torch.randn(4, 3, 48, device=DEVICE)
        (batched,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads]
        torch.testing.assert_close(batched, torch.stack(each))


def test_only_what_needs_a_gradient_gets_one():
    op, state, settings = cases()["plain"]
    x = torch.randn(3, 64, device=DEVICE)
    eager.linear(op, x, state, settings).sum().backward()  # the bias alone
    assert state[2].grad.tolist() == [3.0] * 48
    frozen = (*state[:2], state[2].detach())
    x.requires_grad_()
    eager.linear(op, x, frozen, settings).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert eager.linear(op, x, state, settings).grad_fn is None


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_checkpointing_computes_again_what_it_did_not_keep(reentrant):
    op, state, settings = cases()["plain"]
    state = (*state[:2], state[2].detach())
    gradients = []
    for is_kept in (True, False):
        x = torch.linspace(-1, 1, 192, device=DEVICE).view(3, 64).requires_grad_()

        def block(x):
            return torch.tanh(eager.linear(op, x * 2, state, settings))

        out = block(x) if is_kept else checkpoint(block, x, use_reentrant=reentrant)
        out.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen")
def test_codes_that_are_written_after_the_forward_pass_are_an_error():
    op, state, settings = cases()["nested"]
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    out = eager.linear(op, x, state, settings)
    state[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_hooks_that_save_another_tensor_are_obeyed():
    """As those of offloaded blocks: what was in their slot is gone when the backward pass runs."""
    op, state, settings = cases()["plain"]
    x, slot = torch.randn(3, 64, device=DEVICE, requires_grad=True), state[0].clone()

    def pack(tensor):
        return state[0] if tensor is slot else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = eager.linear(op, x, (slot, *state[1:]), settings)
    slot.zero_()
    (found,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(eager.linear(op, x, state, settings).sum(), x)
    assert torch.equal(found, expected)


def test_the_result_can_be_changed_in_place():
    op, state, settings = cases()["plain"]
    x = torch.randn(1, 3, 64, device=DEVICE, requires_grad=True)
    out = eager.linear(op, x, state, settings)
    out += 1
    torch.relu_(out)
    out.sum().backward()
    assert x.grad.shape == x.shape


def stack_cases():
    weights = torch.randn(4, 48, 64, device=DEVICE)
    packed, absmax = ops.quantize_4bit(weights.flatten(0, 1), "nf4", 32)
    nested = ops.quantize_absmax(absmax)
    codes, bias = packed.view(4, 48, 32), torch.randn(4, 48, device=DEVICE, requires_grad=True)
    int8, scales = ops.quantize_int8(weights.flatten(0, 1))
    return {
        "plain": ((codes, absmax.view(torch.int32).view(4, 48, 2), bias), (None, None, "nf4", 32, 64)),
        "nested": ((codes, nested[0].view(4, 48, 2), bias, *nested[1:]), ("nf4", 32, 64)),
        "no-bias": ((codes, absmax.view(4, 48, 2), None), (None, None, "nf4", 32, None)),
        "int8": ((int8.view(4, 48, 64), scales.view(4, 48, 1), bias), (2.0,)),
    }


ROUTES = {  # rows of x, and which weight multiplies which row: the second has no row, and a row may have no weight
    "grouped_linear": (9, torch.tensor([3, 3, 7, 8], dtype=torch.int32, device=DEVICE)),
    "routed_linear": (3, torch.tensor([3, 0, 0, 2, 4, -1], device=DEVICE)),
}


@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("name", ["plain", "nested", "no-bias", "int8"])
def test_gradients_of_stacks_are_those_behind_the_dispatcher(name, kind):
    (state, settings), (rows, route) = stack_cases()[name], ROUTES[kind]
    op = f"{kind}_int8" if name == "int8" else f"{kind}_4bit"
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, 64, device=DEVICE).to(dtype).requires_grad_()
        got, expected = eager.routed(op, x, route, state, settings), getattr(library, op)(x, route, *state, *settings)
        assert (type(got.grad_fn).__name__ == "_StackBackward") == TELLS_LISTENERS
        assert torch.equal(got, expected)
        for mine, theirs in zip(gradients(got, x, state[2]), gradients(expected, x, state[2]), strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.abs().sum() > 0
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ROUTES)
def test_a_checkpoint_of_a_stack_reads_what_was_saved_once(kind):
    (state, settings), (rows, route), op = stack_cases()["plain"], ROUTES[kind], f"{kind}_4bit"

    def by_the_dispatcher(op, x, route, state, settings):
        return getattr(library, op)(x, route, *state, *settings)

    for product in (eager.routed, by_the_dispatcher):
        results = []
        for is_kept in (True, False):
            x = torch.linspace(-1, 1, rows * 64, device=DEVICE).view(rows, 64).requires_grad_()

            def block(x, bias, product=product):
                return torch.tanh(product(op, x * 2, route, (*state[:2], bias), settings))

            bias = state[2].detach().clone().requires_grad_()
            out = block(x, bias) if is_kept else checkpoint(block, x, bias, use_reentrant=False)
            out.sum().backward()
            results.append([x.grad, bias.grad])
        torch.testing.assert_close(*results, rtol=0, atol=0)
