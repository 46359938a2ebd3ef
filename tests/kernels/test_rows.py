"""Rows that are sorted by weight, gathered, gated and summed again: the kernels give what the reference gives."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bigq.ops import reference
from bigq_kernels import gate, rows

TOKENS, TOP_K, N = 7, 3, 40
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SETTINGS = {"silu": ("silu", 0.0, 0.0), "clamped": ("clamped", 1.702, 2.0)}


def close(got, expected):
    """Equal but for a rounding: the sums of float32 have another order in the kernels."""
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(expected.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [1, 21, 9000], ids=["one", "few", "several-turns"])
def test_sorted_rows_keep_their_order_and_those_of_no_weight_come_last(size, dtype, device):
    ids = torch.randint(-1, 6, (size,), device=device).to(dtype)
    got, expected = rows.sort_rows(ids, 5), reference.sort_rows(ids, 5)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    order, places, stops = (part.tolist() for part in got)
    key = [weight if 0 <= weight < 5 else 5 for weight in ids.tolist()]
    assert order == sorted(range(size), key=lambda row: key[row])
    assert [order[place] for place in places] == list(range(size))
    assert stops == [sum(weight <= e for weight in key) for e in range(5)]


def route(device):
    ids = torch.randint(-1, 6, (TOKENS * TOP_K,), device=device)
    order, places, _ = reference.sort_rows(ids, 5)
    return order, places


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("is_sorted", [False, True], ids=["as-they-come", "sorted"])
def test_rows_are_taken_and_summed_as_the_reference_does_it(is_sorted, weighted, dtype, device):
    order, places = route(device) if is_sorted else (None, None)
    factors = torch.rand(TOKENS, TOP_K, device=device).to(dtype) if weighted else None
    x = torch.randn(TOKENS, N, device=device).to(dtype)
    args = (x, order, factors, TOKENS * TOP_K, dtype)
    close(rows.take_rows(*args), reference.take_rows(*args))
    each = torch.randn(TOKENS * TOP_K, N, device=device).to(dtype)
    args = (each, places, factors, TOKENS, dtype)
    close(rows.sum_rows(*args), reference.sum_rows(*args))
    args = (each, places, x, dtype)
    close(rows.dot_rows(*args), reference.dot_rows(*args))


def test_the_sum_of_rows_by_hand(device):
    each = torch.tensor([[1.0, 2], [10, 20], [100, 200], [1000, 2000]], device=device)
    places = torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=device)
    factors = torch.tensor([[2.0, 3], [1, 0.5]], device=device)
    expected = torch.tensor([[203.0, 406], [510, 1020]], device=device)
    for module in (rows, reference):
        assert torch.equal(module.sum_rows(each, places, factors, 2, torch.float32), expected)
        dots = module.dot_rows(each, places, torch.tensor([[1.0, 1], [0, 1]], device=device), torch.float32)
        assert dots.tolist() == [[300, 3], [20, 2000]]
        taken = module.take_rows(expected, places.long(), factors, 4, torch.float32)
        assert taken.tolist() == [[510, 1020], [406, 812], [609, 1218], [255, 510]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SETTINGS)
def test_gates_and_their_gradients_are_those_of_the_reference(kind, dtype, device):
    x, grad = torch.randn(5, 2 * N, device=device) * 4, torch.randn(5, N, device=device)
    exact = x.to(dtype).double().requires_grad_()
    out = reference.gated(exact, *SETTINGS[kind])
    of_x = torch.autograd.grad(out, exact, grad.to(dtype).double())[0]
    for module in (gate, reference):
        close(module.gated(x.to(dtype), *SETTINGS[kind]), out.detach().to(dtype))
        close(module.gated_backward(grad.to(dtype), x.to(dtype), *SETTINGS[kind]), of_x.to(dtype))


@pytest.mark.parametrize("kind", SETTINGS)
def test_gates_hand_on_nan(kind, device):
    """What became NaN in the product before does not become a number again."""
    odd = torch.tensor([torch.nan, -9.0, 1.0, 9.0], device=device)
    gates, ups = (part.flatten() for part in torch.meshgrid(odd, odd, indexing="ij"))
    x = torch.cat([gates, ups])[None] if kind == "silu" else torch.stack([gates, ups], dim=1).view(1, -1)
    grad = torch.ones(1, len(gates), device=device)
    got, expected = gate.gated(x, *SETTINGS[kind]), reference.gated(x, *SETTINGS[kind])
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(
        gate.gated_backward(grad, x, *SETTINGS[kind]),
        reference.gated_backward(grad, x, *SETTINGS[kind]),
        equal_nan=True,
    )


X = torch.ones(4, 4)
MISFITS = {  # what does not fit: the op, and its arguments
    "ids that are floats": ("sort_rows", (torch.ones(4), 2)),
    "ids of two dimensions": ("sort_rows", (torch.ones(4, 1, dtype=torch.int64), 2)),
    "factors of more experts than a token has rows": ("sum_rows", (X, None, torch.ones(2, 3), 2, X.dtype)),
    "rows that are no multiple of the tokens": ("sum_rows", (X[:3], None, None, 2, X.dtype)),
    "no tokens": ("sum_rows", (X, None, None, 0, X.dtype)),
    "places of fewer rows": ("sum_rows", (X, torch.arange(3, dtype=torch.int32), None, 2, X.dtype)),
    "places that are floats": ("sum_rows", (X, torch.zeros(4), None, 2, X.dtype)),
    "an order of fewer rows": ("take_rows", (X[:2], torch.arange(3), None, 4, X.dtype)),
    "factors of fewer rows": ("take_rows", (X[:2], None, torch.ones(2, 1), 4, X.dtype)),
    "tokens of another width": ("dot_rows", (X, None, torch.ones(2, 5), X.dtype)),
    "an odd width": ("gated", (X[:, :3], "silu", 0.0, 0.0)),
    "a gate of another kind": ("gated", (X, "gelu", 0.0, 0.0)),
    "a gradient of another width": ("gated_backward", (X, X, "silu", 0.0, 0.0)),
}


def fake(name):
    def call(*args):
        with FakeTensorMode() as mode:
            args = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            return getattr(torch.ops.bigq, name)(*args)

    return call


IMPLEMENTATIONS = {
    "launcher": lambda name: getattr(gate if name.startswith("gated") else rows, name),
    "reference": lambda name: getattr(reference, name),
    "op": lambda name: getattr(torch.ops.bigq, name),
    "fake": fake,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("what", MISFITS)
def test_tensors_that_do_not_fit_are_refused(what, implementation):
    name, arguments = MISFITS[what]
    with pytest.raises(RuntimeError, match="; expected"):
        IMPLEMENTATIONS[implementation](name)(*arguments)


def test_an_order_may_have_strides(device):
    order, places = route(device)
    wide = [torch.stack([part, part], dim=1)[:, 0] for part in (order, places)]
    x, each = torch.randn(TOKENS, N, device=device), torch.randn(TOKENS * TOP_K, N, device=device)
    taken = rows.take_rows(x, wide[0], None, TOKENS * TOP_K, x.dtype)
    assert torch.equal(taken, rows.take_rows(x, order, None, TOKENS * TOP_K, x.dtype))
    total = rows.sum_rows(each, wide[1], None, TOKENS, x.dtype)
    assert torch.equal(total, rows.sum_rows(each, places, None, TOKENS, x.dtype))
    dots = rows.dot_rows(each, wide[1], x, x.dtype)
    assert torch.equal(dots, rows.dot_rows(each, places, x, x.dtype))
