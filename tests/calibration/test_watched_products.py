"""WatchedProducts: every way to multiply by a weight is seen, with the right tokens, sides and gradients."""

import pytest
import torch
from torch.nn import functional as F

from bigq.calibration.watched_products import Use, WatchedProducts, WatchedWeight
from bigq.system.internals import GROUPED_PRODUCTS

N, K, M, E = 5, 4, 7, 3


def watching(weight, *, transposed=False, gradients=True, size=1000):
    return WatchedProducts([WatchedWeight("w", weight, transposed)], size=size, seed=0, gradients=gradients)


# name: shape of the weight, whether it is held as [..., K, N], shape of the input, the product, what the use is
MATRIX = {
    "linear": ((N, K), False, (M, K), lambda x, w: F.linear(x, w), "outputs"),
    "linear of a batch": ((N, K), False, (2, M, K), lambda x, w: F.linear(x, w, torch.ones(N)), "outputs"),
    "x @ w.T": ((N, K), False, (M, K), lambda x, w: x @ w.T, "outputs"),
    "mm": ((N, K), False, (M, K), lambda x, w: torch.mm(x, mat2=w.t()), "outputs"),
    "matmul by name": ((N, K), False, (M, K), lambda x, w: torch.matmul(input=x, other=w.T), "outputs"),
    "linear by name": ((N, K), False, (M, K), lambda x, w: F.linear(input=x, weight=w, bias=None), "outputs"),
    "matmul of a batch": ((N, K), False, (2, M, K), lambda x, w: torch.matmul(x, w.mT), "outputs"),
    "w @ x": ((N, K), False, (K, M), lambda x, w: w @ x, "outputs"),
    "x @ w": ((N, K), False, (M, N), lambda x, w: x @ w, "inputs"),
    "conv1d": ((K, N), True, (M, K), lambda x, w: torch.addmm(torch.ones(N), x, w), "outputs"),
    "square x @ w": ((K, K), False, (M, K), lambda x, w: x @ w, "inputs"),
    "square linear": ((K, K), False, (M, K), lambda x, w: F.linear(x, w), "outputs"),
}


@pytest.mark.parametrize("name", MATRIX)
def test_products_of_a_matrix(name):
    shape, transposed, x_shape, multiply, kind = MATRIX[name]
    weight, x = torch.randn(shape), torch.randn(x_shape)
    watch = watching(weight, transposed=transposed)
    with watch:
        out = multiply(x, weight)
    assert torch.equal(out, multiply(x, weight))
    scale = torch.randn_like(out)
    (out * scale).sum().backward()
    (use, tokens), *others = watch.tokens().items()
    assert not others
    assert use == Use("w", kind)
    left = name == "w @ x"
    assert torch.equal(tokens.inputs, (x.T if left else x).reshape(-1, tokens.inputs.shape[1]))
    assert torch.equal(tokens.gradients, (scale.T if left else scale).reshape(-1, tokens.gradients.shape[1]))
    assert tokens.members is None
    assert tokens.seen.tolist() == [len(tokens.inputs)]


STACK = {
    "index and linear": (False, lambda x, w: torch.stack([F.linear(x[e], w[e]) for e in range(E)])),
    "index and matmul": (True, lambda x, w: torch.stack([x[e] @ w[e] for e in range(E)])),
    "bmm": (False, lambda x, w: torch.bmm(x, w.mT)),
    "bmm of a transposed stack": (True, lambda x, w: torch.bmm(x, w)),
    "matmul": (False, lambda x, w: x @ w.transpose(1, 2)),
    "w @ x": (False, lambda x, w: (w @ x.mT).mT),
}


@pytest.mark.parametrize("name", STACK)
def test_products_of_a_stack(name):
    transposed, multiply = STACK[name]
    weight = torch.randn(E, K, N) if transposed else torch.randn(E, N, K)
    x = torch.randn(E, M, K)
    watch = watching(weight, transposed=transposed)
    with watch:
        out = multiply(x, weight)
    scale = torch.randn_like(out)
    (out * scale).sum().backward()
    ((use, tokens),) = watch.tokens().items()
    assert use.kind == "outputs"
    assert tokens.seen.tolist() == [M] * E
    for member in range(E):
        inputs, gradients = tokens.of(member)
        assert torch.equal(inputs, x[member])
        assert torch.equal(gradients, scale[member])


@pytest.mark.parametrize("function", GROUPED_PRODUCTS, ids=lambda function: function.__module__ or "torch")
def test_grouped_products(function):
    weight, x = torch.randn(E, 16, 8, dtype=torch.bfloat16), torch.randn(9, 8, dtype=torch.bfloat16)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)  # the second matrix has no row, and two rows have no matrix
    watch = watching(weight)
    with watch:
        out = function(x, weight.mT, offs=ends)
    scale = torch.randn_like(out)
    (out * scale)[:7].sum().backward()
    ((_, tokens),) = watch.tokens().items()
    assert tokens.seen.tolist() == [2, 0, 5]
    assert torch.equal(tokens.of(0)[0], x[:2])
    assert torch.equal(tokens.of(2)[0], x[2:7])
    assert torch.equal(tokens.of(2)[1], scale[2:7])


@pytest.mark.parametrize("lookup", [F.embedding, lambda ids, w: torch.embedding(w, ids)], ids=["F", "torch"])
def test_lookups(lookup):
    weight, ids = torch.randn(N, K), torch.tensor([[0, 3], [3, 1]])
    watch = watching(weight)
    with watch:
        out = lookup(ids, weight)
    scale = torch.randn_like(out)
    (out * scale).sum().backward()
    ((use, tokens),) = watch.tokens().items()
    assert use == Use("w", "rows")
    assert torch.equal(tokens.inputs, ids.flatten())
    assert torch.equal(tokens.gradients, scale.view(-1, K))


def test_a_tied_weight_has_two_uses():
    weight = torch.randn(N, K)
    watch = watching(weight)
    with watch:
        F.linear(F.embedding(torch.tensor([1, 2]), weight), weight)
    assert set(watch.tokens()) == {Use("w", "rows"), Use("w", "outputs")}


def test_other_weights_and_parts_are_not_taken_for_it():
    weight = torch.randn(2 * N, K)
    watch = watching(weight)
    with watch:
        x = torch.randn(M, K)
        F.linear(x, torch.randn(2 * N, K))
        F.linear(x, weight[:N])
        F.linear(x, weight.clone())
        torch.einsum("mk,nk->mn", x, torch.randn(N, K))
        torch.sparse.mm(torch.eye(K).to_sparse(), weight.mT)
    assert not watch.samples


def test_outputs_may_be_written_to_in_place():
    weight, x = torch.randn(N, K), torch.randn(M, K)
    watch = watching(weight)
    with watch:
        out = F.linear(x, weight)
        out += 1
        out.relu_()
    out.sum().backward()
    expected = ((x @ weight.T + 1) > 0).float()
    assert torch.equal(watch.tokens()[Use("w", "outputs")].gradients, expected)


def test_padding_is_left_out():
    weight, x = torch.randn(N, K), torch.randn(2, 3, K)
    watch = watching(weight)
    watch.mask = torch.tensor([[True, True, False], [False, True, True]])
    with watch:
        F.linear(x, weight).sum().backward()
        F.linear(x[0], weight)  # of another shape: all of it counts
    tokens = watch.tokens()[Use("w", "outputs")]
    assert torch.equal(tokens.inputs, torch.cat([x[watch.mask], x[0]]))


def test_weights_that_multiply_under_no_grad_are_named():
    weight = torch.randn(N, K)
    watch = watching(weight)
    with watch, torch.no_grad():
        F.linear(torch.randn(M, K), weight)
    assert list(watch.without_grad) == ["w"]
    watch = watching(weight, gradients=False)
    with watch, torch.no_grad():
        assert not F.linear(torch.randn(M, K), weight).requires_grad
    assert watch.tokens()[Use("w", "outputs")].gradients is None
