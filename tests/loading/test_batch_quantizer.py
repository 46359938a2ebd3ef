"""BatchQuantizer: however weights arrive, each becomes what its format makes of it alone."""

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from bigq import QuantizationConfig, load_and_quantize_model
from bigq.checkpoint import StoredTensor
from bigq.formats import FP4, NF4, Description, Format, Int8, Rows, TensorSpec, decode_quant_state
from bigq.loading.batch_quantizer import BatchQuantizer
from bigq.loading.jobs import Batch
from bigq.loading.runs import Piece
from bigq.planning.plan import PlannedWeight, WeightRef

FORMATS = [NF4(), FP4(block_size=32, double_quant=True), Int8()]


describe = cache(Description)  # one object for all that look alike, as in a plan


def linear(name, weight, weight_format, *, transposed=False):
    shape = tuple(weight.shape[::-1]) if transposed else tuple(weight.shape)
    description = describe(format=weight_format, shape=shape, dtype=weight.dtype, transposed=transposed)
    ref = WeightRef(owners=(name,), leaf="weight", described={"weight": description})
    weight_name = f"{name}.weight"
    return PlannedWeight(names=(weight_name,), refs=(ref,), description=description, source=weight_name)


def owner(job):
    return job.refs[0].owners[0]


def piece(name, weight, start=0, stop=None):
    info = StoredTensor(name=f"{name}.weight", shape=weight.shape, dtype=weight.dtype, where="f")
    return Piece(info, start, weight[start:stop])


def expected(job, weight):
    return job.description.format.quantize(weight)


def assert_state(state, job, weight):
    wanted = expected(job, weight)
    assert list(state) == list(wanted) == list(job.description.state_spec)
    for part, tensor in state.items():
        assert torch.equal(tensor, wanted[part]), part
    assert state["packed"].untyped_storage().nbytes() == state["packed"].nbytes, "no view of its neighbours' codes"


def test_neighbours_by_chance_have_memory_of_their_own():
    """Decoded weights are tensors of their own, which an allocator may put side by side."""
    memory = torch.randn(40, 96)
    part = partial(torch.frombuffer, memory.numpy(), dtype=torch.float32, count=20 * 96)
    first, second = part(), part(offset=20 * 96 * 4)
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    weights = {"a": first.view(20, 96), "b": second.view(20, 96)}
    items = [(linear(name, weight, NF4()), piece(name, weight)) for name, weight in weights.items()]
    for job, state in BatchQuantizer().quantize(items):
        assert_state(state, job, weights[owner(job)])


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_neighbours_in_one_launch(weight_format, monkeypatch):
    run = torch.randn(60, 96)
    weights = {"a": run[:20], "b": run[20:40], "c": run[40:60]}  # side by side in memory
    items = [(linear(name, weight, weight_format), piece(name, weight)) for name, weight in weights.items()]
    launches = []
    plain = type(weight_format).quantize_rows
    monkeypatch.setattr(
        type(weight_format),
        "quantize_rows",
        lambda self, rows, **how: launches.append(rows.shape) or plain(self, rows, **how),
    )
    quantizer = BatchQuantizer()
    states = {owner(job): (job, state) for job, state in quantizer.quantize(items)}
    assert launches == [(60, 96)]
    for name, (job, state) in states.items():
        assert_state(state, job, weights[name])
    assert states.keys() == weights.keys()
    tensors = [tensor for _, state in states.values() for tensor in state.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors), "each owns its storage"


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_a_huge_weight_in_pieces(weight_format):
    weight = torch.randn(50, 70).bfloat16()
    job, quantizer = linear("a", weight, weight_format), BatchQuantizer()
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
        type(weight_format),
        "quantize_rows",
        lambda self, rows, **how: launches.append(rows.shape) or plain(self, rows, **how),
    )
    states = {owner(job): (job, state) for job, state in BatchQuantizer().quantize(items)}
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
    for job, state in BatchQuantizer().quantize(items):
        weight = weights[owner(job)]
        if owner(job) == "conv":
            weight = weight.T
        assert_state(state, job, weight.float() if weight.dtype == torch.float64 else weight)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_found_among_their_neighbours(bad, double_quant):
    weight_format = NF4(double_quant=double_quant)
    run = torch.randn(60, 96)
    run[25, 3] = bad
    weights = {"a": run[:20], "b": run[20:40], "c": run[40:60]}
    items = [(linear(name, weight, weight_format), piece(name, weight)) for name, weight in weights.items()]
    quantizer = BatchQuantizer()
    states = {job.source: (job.description, state) for job, state in quantizer.quantize(items)}
    assert quantizer.non_finite(states.__getitem__) == ["b.weight"]


def test_every_module_gets_a_quant_state_of_its_own():
    described = {"weight": describe(format=FORMATS[0], shape=(8, 64), dtype=torch.float32)}
    quantizer = BatchQuantizer()
    states = [quantizer.quant_state(described, torch.device("cpu")) for _ in range(70)]
    assert all(decode_quant_state(state, "here") == described for state in states)
    assert len({state.untyped_storage().data_ptr() for state in states}) == 70, "each owns its storage"


@dataclass(frozen=True, kw_only=True)
class _Grouped(Format):
    """What the protocol admits and no format here needs: a scale for 4 rows, relative to one of the whole weight."""

    name = "grouped"
    row_group = 4
    measures = True

    def state_spec(self, shape):
        groups = -(-shape[0] // 4)
        return {
            "packed": TensorSpec(shape=shape, dtype=torch.int8),
            "scale": TensorSpec(shape=(groups,), dtype=torch.int32),
            "whole": TensorSpec(shape=(1,), dtype=torch.int32),
        }

    def measure(self, rows):
        return rows.float().abs().amax().reshape(1)

    def quantize_rows(self, rows, *, method="absmax", measured=None):
        groups = F.pad(rows.float(), (0, 0, 0, -len(rows) % 4)).view(-1, 4, rows.shape[1])
        scale = groups.abs().amax(dim=(1, 2)) / measured
        codes = (groups / (scale * measured)[:, None, None] * 127).round().to(torch.int8)
        bits = (scale.view(torch.int32), measured.view(torch.int32))
        return Rows(
            {"packed": codes.view(-1, rows.shape[1])[: len(rows)], "scale": bits[0], "whole": bits[1]}, scale.amax()
        )

    def finish(self, rows, shape):
        return dict(rows)


def test_a_format_with_a_scale_for_several_rows_and_one_for_the_whole_is_quantized_weight_by_weight():
    run = torch.randn(30, 16)
    weights = {"a": run[:10], "b": run[10:30]}  # neighbours; neither is a whole number of groups
    items = [(linear(name, weight, _Grouped()), piece(name, weight)) for name, weight in weights.items()]
    states = {owner(job): state for job, state in BatchQuantizer().quantize(items)}
    for name, weight in weights.items():
        for part, tensor in _Grouped().quantize(weight).items():
            assert torch.equal(states[name][part], tensor)
        assert {part: (tuple(t.shape), t.dtype) for part, t in states[name].items()} == {
            part: (spec.shape, spec.dtype) for part, spec in _Grouped().state_spec(tuple(weight.shape)).items()
        }


@pytest.mark.parametrize(
    "weight_format, shape, transposed, splits, row_group",
    [
        pytest.param(NF4(), (64, 32), False, True, 1, id="rows"),
        pytest.param(NF4(), (64, 32), True, False, 1, id="transposed"),
        pytest.param(NF4(), (4, 64, 32), True, True, 1, id="stack-transposed"),
        pytest.param(_Grouped(), (64, 32), False, False, 4, id="measured"),
    ],
)
def test_how_a_weight_arrives_suits_its_format(weight_format, shape, transposed, splits, row_group):
    description = describe(format=weight_format, shape=shape, dtype=torch.float32, transposed=transposed)
    planned = PlannedWeight(names=("a.weight",), refs=(), description=description, source="a.weight")
    target = Batch().target(torch.device("cpu"), planned)
    assert (target.may_split, target.row_group) == (splits, row_group)


def test_weights_stored_in_different_dtypes_are_not_taken_for_one_matrix(tmp_path):
    """Between them lies a tensor of just the size that a matrix of the first one's dtype would have there."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
            self.register_buffer("b", torch.full((64,), 9.0))

    torch.manual_seed(0)
    tensors = {name: tensor if name == "a.weight" else tensor.half() for name, tensor in Model().state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors")  # a.weight in float32, then b, c.weight and so on in float16
    with torch.device("meta"):
        model = Model()
    config = QuantizationConfig("nf4", dtype="float32")
    load_and_quantize_model(model, tmp_path / "m.safetensors", config, "cpu", progress=False)
    for name in ("a", "c"):
        packed = NF4().quantize(tensors[f"{name}.weight"].float())["packed"]
        assert torch.equal(model.get_submodule(name).weight_packed, packed), name
