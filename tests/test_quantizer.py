"""Quantizer: however weights arrive, each becomes what its format makes of it alone."""

from functools import cache

import pytest
import torch

from bigq.checkpoint import StoredTensor
from bigq.formats import Block4, Description, Int8
from bigq.plan import PlannedLinear
from bigq.quantizer import Quantizer
from bigq.runs import Piece

FORMATS = [Block4(quant_type="nf4"), Block4(quant_type="fp4", block_size=32, double_quant=True), Int8()]


describe = cache(Description)  # one object for all that look alike, as in a plan


def linear(name, weight, weight_format, *, transposed=False):
    shape = tuple(weight.shape[::-1]) if transposed else tuple(weight.shape)
    description = describe(format=weight_format, shape=shape, dtype=weight.dtype)
    return PlannedLinear(names=(name,), description=description, source=f"{name}.weight", transposed=transposed)


def piece(name, weight, start=0, stop=None):
    info = StoredTensor(name=f"{name}.weight", shape=weight.shape, dtype=weight.dtype, where="f")
    return Piece(info, start, weight[start:stop])


def expected(job, weight):
    state = job.description.format.quantize(weight)
    return {**state, "quant_state": job.description.encode()}


def assert_state(state, job, weight):
    wanted = expected(job, weight)
    assert list(state) == list(wanted) == list(job.description.state_spec)
    for leaf, tensor in state.items():
        assert torch.equal(tensor, wanted[leaf]), leaf
    assert state["weight"].untyped_storage().nbytes() == state["weight"].nbytes, "no view of its neighbours' codes"


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_neighbours_in_one_launch(weight_format, monkeypatch):
    run = torch.randn(60, 96)
    weights = {"a": run[:20], "b": run[20:40], "c": run[40:60]}  # side by side in memory
    items = [(linear(name, weight, weight_format), piece(name, weight)) for name, weight in weights.items()]
    launches = []
    plain = type(weight_format).quantize_rows
    monkeypatch.setattr(
        type(weight_format), "quantize_rows", lambda self, rows: launches.append(rows.shape) or plain(self, rows)
    )
    quantizer = Quantizer()
    states = {job.names[0]: (job, state) for job, state in quantizer.quantize(items)}
    assert launches == [(60, 96)]
    for name, (job, state) in states.items():
        assert_state(state, job, weights[name])
    assert states.keys() == weights.keys()
    tensors = [tensor for _, state in states.values() for tensor in state.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors), "each owns its storage"


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_a_huge_weight_in_pieces(weight_format):
    weight = torch.randn(50, 70).bfloat16()
    job, quantizer = linear("a", weight, weight_format), Quantizer()
    for start, stop in ((0, 20), (20, 40)):
        assert list(quantizer.quantize([(job, piece("a", weight, start, stop))])) == []
    ((_, state),) = quantizer.quantize([(job, piece("a", weight, 40, 50))])
    assert_state(state, job, weight)


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_what_looks_alike_with_others_between_in_one_launch(weight_format, transposed, monkeypatch):
    """As the experts of a mixture have it: down, gate, up, down, gate, up."""
    shapes = {"a.down": (96, 32), "a.gate": (40, 96), "a.up": (40, 96), "b.down": (96, 32), "b.gate": (40, 96)}
    run = torch.randn(sum(rows * columns for rows, columns in shapes.values())).bfloat16()
    sizes = [rows * columns for rows, columns in shapes.values()]
    weights = {
        name: flat.view(shape) for (name, shape), flat in zip(shapes.items(), run.split_with_sizes(sizes), strict=True)
    }
    items = [(linear(n, w, weight_format, transposed=transposed), piece(n, w)) for n, w in weights.items()]
    launches = []
    plain = type(weight_format).quantize_rows
    monkeypatch.setattr(
        type(weight_format), "quantize_rows", lambda self, rows: launches.append(rows.shape) or plain(self, rows)
    )
    states = {job.names[0]: (job, state) for job, state in Quantizer().quantize(items)}
    assert launches == ([(64, 96), (288, 40)] if transposed else [(192, 32), (120, 96)])
    assert states.keys() == weights.keys()
    for name, (job, state) in states.items():
        assert_state(state, job, weights[name].T if transposed else weights[name])


def test_what_does_not_look_alike_is_quantized_apart():
    nf4 = FORMATS[0]
    weights = {
        "wide": torch.randn(8, 96),
        "narrow": torch.randn(8, 32),
        "half": torch.randn(8, 32).half(),
        "double": torch.randn(8, 32).double(),
        "conv": torch.randn(8, 32),
    }
    items = [(linear(n, w, nf4, transposed=n == "conv"), piece(n, w)) for n, w in weights.items()]
    for job, state in Quantizer().quantize(items):
        weight = weights[job.names[0]]
        if job.names[0] == "conv":
            weight = weight.T
        assert_state(state, job, weight.float() if weight.dtype == torch.float64 else weight)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_found_among_their_neighbours(bad, double_quant):
    weight_format = Block4(quant_type="nf4", double_quant=double_quant)
    run = torch.randn(60, 96)
    run[25, 3] = bad
    weights = {"a": run[:20], "b": run[20:40], "c": run[40:60]}
    items = [(linear(name, weight, weight_format), piece(name, weight)) for name, weight in weights.items()]
    quantizer = Quantizer()
    states = {job.source: state for job, state in quantizer.quantize(items)}
    assert quantizer.non_finite(states) == ["b.weight"]
