"""The steps around the products of experts: the kernels' gradients are those of the same steps in torch."""

import pytest
import torch

from bigq.ops import routes, token_rows
from bigq.ops.token_rows import Gate

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, TOP_K, N = 5, 3, 8


@pytest.fixture
def kernels(monkeypatch):
    """Takes the kernels, on a CPU those of the interpreter. Gives the names of the ops that were asked for."""
    if DEVICE == "cpu":
        monkeypatch.setattr(token_rows, "_is_plain", lambda tensor, dtype=None: bool(tensor.numel()))
    asked, original = [], token_rows._run

    def run(name, *args):
        asked.append(name)
        return original(name, *args)

    monkeypatch.setattr(token_rows, "_run", run)
    return asked


def inputs():
    x = torch.randn(TOKENS, N, device=DEVICE, requires_grad=True)
    factors = torch.rand(TOKENS, TOP_K, device=DEVICE, requires_grad=True)
    return x, factors, torch.randint(0, 5, (TOKENS * TOP_K,), device=DEVICE)  # 4 is no weight


def steps(module, x, factors, ids, kind):
    """All of them: sorted or not, gated or not."""
    by_kernels = module is token_rows
    gate = Gate(kind, 1.5, 1.0)
    if kind == "unsorted":
        rows, order, places = x.repeat_interleave(TOP_K, dim=0), None, None
    else:
        order, places, _ = module.sort_rows(ids, 4)
        rows = module.take_rows(x, order, places) if by_kernels else module.take_rows(x, order, None, len(ids), x.dtype)
        rows = module.gated(rows, gate) if by_kernels else module.gated(rows, *gate)
    rows = rows * torch.linspace(0.1, 1, len(ids), device=DEVICE)[:, None]
    if by_kernels:
        return module.sum_rows(rows, factors, order, places, torch.float32)
    return module.sum_rows(rows, places, factors, TOKENS, torch.float32)


@pytest.mark.parametrize("kind", ["silu", "clamped", "unsorted"])
def test_gradients_are_those_of_the_same_steps_in_torch(kind, kernels):
    x, factors, ids = inputs()
    results = []
    for module in (token_rows, routes):
        out = steps(module, x, factors, ids, kind)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, factors))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    forward = ["sum_rows"] if kind == "unsorted" else ["sort_rows", "take_rows", "gated", "sum_rows"]
    backward = ["take_rows", "dot_rows"] + ([] if kind == "unsorted" else ["gated_backward", "sum_rows"])
    assert kernels == forward + backward


def test_gradients_have_gradients(kernels):
    x, factors, ids = inputs()
    results = []
    for module in (token_rows, routes):
        out = steps(module, x, factors, ids, "silu")
        first = torch.autograd.grad(out.sin().sum(), (x, factors), create_graph=True)
        if module is token_rows:
            assert kernels == ["sort_rows", "take_rows", "gated", "sum_rows"]  # the backward pass is in torch
        results.append(torch.autograd.grad(sum(part.square().sum() for part in first), (x, factors)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_mode_that_hears_ops_hears_these(kernels):
    from torch.utils._python_dispatch import TorchDispatchMode

    heard = []

    class Heard(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(func)
            return func(*args, **(kwargs or {}))

    x, factors, ids = inputs()
    with Heard():
        steps(token_rows, x, factors, ids, "silu")
    assert {op for op in heard if op.namespace == "bigq"} == {
        getattr(torch.ops.bigq, name).default for name in ("sort_rows", "take_rows", "gated", "sum_rows")
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_kernels_do_not_take_is_computed_in_torch(dtype, monkeypatch):
    monkeypatch.setattr(token_rows, "_run", None)  # would raise
    ids = torch.tensor([1, 0, 1, 1])
    order, places, stops = token_rows.sort_rows(ids, 2)
    assert (order.tolist(), places.tolist(), stops.tolist()) == ([1, 0, 2, 3], [1, 0, 2, 3], [1, 4])
    x = torch.tensor([[1.0], [2.0]], dtype=dtype)
    rows = token_rows.take_rows(x, order, places)
    assert rows.tolist() == [[1.0], [1.0], [2.0], [2.0]]
    out = token_rows.sum_rows(rows, torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype), order, places, dtype)
    assert (out.dtype, out.tolist()) == (dtype, [[3.0], [14.0]])
    assert token_rows.sum_rows(rows[:0], torch.ones(0, 2), None, None, dtype).shape == (0, 1)


def test_an_unknown_gate_is_refused():
    with pytest.raises(RuntimeError, match="the gate 'gelu'"):
        torch.ops.bigq.gated(torch.ones(2, 4), "gelu", 0.0, 0.0)
