"""sensitivities: against the matrices G and F of the definition, on every use of a weight."""

import pytest
import torch

import bigq
from bigq.calibration import sensitivity
from bigq.calibration.sampled_passes import Sampled
from bigq.calibration.sensitivity import sensitivities
from bigq.calibration.token_sample import Tokens
from bigq.calibration.watched_products import Use, WatchedWeight
from bigq.formats import Description
from bigq.planning.plan import PlannedWeight

N, K, T = 24, 40, 30
FORMATS = (bigq.NF4(block_size=32), bigq.NF4(block_size=32, double_quant=True), bigq.Int8())


def tokens(inputs, gradients, members=None, seen=None):
    return Tokens(inputs=inputs, gradients=gradients, members=members, seen=torch.tensor(seen or [len(inputs)]))


def measured(weight, uses, *, kind="kfac", predictions=T, transposed=False):
    found = Sampled(tokens={Use("w", name): of for name, of in uses.items()}, predictions=predictions)
    weights = [WatchedWeight("w", weight, transposed)]
    plans = []
    for weight_format in FORMATS:
        shape = tuple(weights[0].matrix.shape)
        described = Description(
            format=weight_format, shape=shape, dtype=weight.dtype, compute_dtype=None, transposed=transposed
        )
        plans.append({"w": PlannedWeight(names=("w",), refs=(), description=described, source="w")})
    return sensitivities(weights, plans, found, kind=kind)["w"]


def changes(weight):
    """What each format changes, in float64."""
    decoded = [f.dequantize(f.quantize(weight), tuple(weight.shape), torch.float32) for f in FORMATS]
    return [(values - weight).double() for values in decoded]


def moments(rows):
    return rows.double().T @ rows.double() / len(rows)


def close(got, expected):
    return got == pytest.approx([float(value) for value in expected], rel=1e-4)


@pytest.fixture(params=[False, True], ids=["whole", "in ranges of rows"])
def ranges(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(sensitivity, "_MOST", 7 * K)


def test_kfac_is_half_the_trace_of_d_g_d_f(ranges):
    weight, x, g = torch.randn(N, K), torch.randn(T, K) * torch.rand(K), torch.randn(T, N) * torch.rand(N)
    expected = [torch.trace(d @ moments(x) @ d.T @ moments(g)) / 2 for d in changes(weight)]
    assert close(measured(weight, {"outputs": tokens(x, g)}), expected)
    assert close(measured(weight.mT.contiguous(), {"outputs": tokens(x, g)}, transposed=True), expected)
    # ten tokens a prediction, as patches of an image have
    assert close(measured(weight, {"outputs": tokens(x, g, seen=[10 * T])}), [10 * value for value in expected])


def test_kfac_of_a_product_from_the_other_side(ranges):
    weight, x, g = torch.randn(N, K), torch.randn(T, N), torch.randn(T, K)
    expected = [torch.trace(d.T @ moments(x) @ d @ moments(g)) / 2 for d in changes(weight)]
    assert close(measured(weight, {"inputs": tokens(x, g)}), expected)


def test_kfac_of_a_lookup(ranges):
    weight, ids, g = torch.randn(N, K), torch.randint(N, (T,)), torch.randn(T, K)
    share = torch.bincount(ids, minlength=N).double() / T
    expected = [torch.trace(d.T @ share.diag() @ d @ moments(g)) / 2 for d in changes(weight)]
    assert close(measured(weight, {"rows": tokens(ids, g)}), expected)


def test_uses_of_a_tied_weight_add_up():
    weight, ids = torch.randn(N, K), torch.randint(N, (T,))
    looked_up, multiplied = tokens(ids, torch.randn(T, K)), tokens(torch.randn(T, K), torch.randn(T, N))
    each = [measured(weight, {"rows": looked_up}), measured(weight, {"outputs": multiplied})]
    assert close(
        measured(weight, {"rows": looked_up, "outputs": multiplied}), [sum(pair) for pair in zip(*each, strict=True)]
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["[E, N, K]", "[E, K, N]"])
def test_kfac_of_a_stack_is_that_of_its_matrices(transposed, ranges):
    weight, seen = torch.randn(3, N, K), [50, 0, 10]
    members = torch.tensor([0] * 20 + [2] * 10)
    x, g = torch.randn(T, K), torch.randn(T, N)
    expected = []
    for d in changes(weight):
        of = [
            seen[e] * torch.trace(d[e] @ moments(x[members == e]) @ d[e].T @ moments(g[members == e])) for e in (0, 2)
        ]
        expected.append(sum(of) / 2 / 60)
    held = weight.mT.contiguous() if transposed else weight
    stack = tokens(x, g, members, seen)
    assert close(measured(held, {"outputs": stack}, predictions=60, transposed=transposed), expected)
    # a matrix with no token in the sample is taken to be as the others
    more = tokens(x, g, members, [50, 15, 10])
    assert close(
        measured(held, {"outputs": more}, predictions=60, transposed=transposed), [v * 75 / 60 for v in expected]
    )


def test_relative_output_error(ranges):
    weight, x = torch.randn(N, K), torch.randn(T, K) * torch.rand(K)
    expected = [(d @ x.T.double()).square().sum() / (weight @ x.T).square().sum() for d in changes(weight)]
    assert close(measured(weight, {"outputs": tokens(x, None)}, kind="output"), expected)
    y = torch.randn(T, N)
    expected = [(y.double() @ d).square().sum() / (y @ weight).square().sum() for d in changes(weight)]
    assert close(measured(weight, {"inputs": tokens(y, None)}, kind="output"), expected)
    ids = torch.randint(N, (T,))
    expected = [d[ids].square().sum() / weight[ids].square().sum() for d in changes(weight)]
    assert close(measured(weight, {"rows": tokens(ids, None)}, kind="output"), expected)


def test_inputs_or_gradients_of_zero_give_zero():
    weight, x, g = torch.randn(N, K), torch.randn(T, K), torch.randn(T, N)
    assert measured(weight, {"outputs": tokens(0 * x, g)}) == (0.0, 0.0, 0.0)
    assert measured(weight, {"outputs": tokens(x, 0 * g)}) == (0.0, 0.0, 0.0)
    assert measured(weight, {"outputs": tokens(0 * x, None)}, kind="output") == (0.0, 0.0, 0.0)


def test_inputs_that_meet_no_error_give_none():
    """The first half of K is stored exactly: zeros and the largest value of each block."""
    weight = torch.randn(N, 64)
    weight[:, :32] = torch.randn(N, 1) * (torch.arange(32) % 2)
    x = torch.cat([torch.randn(T, 32), torch.zeros(T, 32)], 1)
    assert measured(weight, {"outputs": tokens(x, torch.randn(T, N))})[0] == 0.0
    assert measured(weight, {"outputs": tokens(x.flip(1), torch.randn(T, N))})[0] > 0.0


def test_nan_is_named():
    weight, x = torch.randn(N, K), torch.randn(T, K)
    x[3, 2] = float("inf")
    with pytest.raises(bigq.ConfigError, match=r"the sensitivities of 1 weights are NaN or Inf: w; .*bfloat16"):
        measured(weight, {"outputs": tokens(x, torch.randn(T, N))})


def test_bfloat16_tokens_are_multiplied_in_float32():
    weight, x, g = torch.randn(N, K).bfloat16(), torch.randn(T, K).bfloat16(), torch.randn(T, N).bfloat16()
    expected = [torch.trace(d @ moments(x) @ d.T @ moments(g)) / 2 for d in changes(weight.float())]
    assert close(measured(weight, {"outputs": tokens(x, g)}), expected)
