"""QuantizedModule: copies, casts and state dicts of modules of every class that has quantized weights."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from bigq import FP4, NF4, Int8, QuantizationConfig, QuantizedModule, load_and_quantize_model
from bigq.formats import QUANT_STATE, decode_quant_state

FORMATS = {"nf4": NF4(), "nf4-double": NF4(double_quant=True), "fp4": FP4(block_size=32), "int8": Int8()}


class Projection(nn.Linear):
    """A linear under a name of its own."""


class Gated(nn.Module):
    """A module of two weights that it multiplies by itself, and a parameter that stays as it is."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 8, 71))
        self.down = nn.Parameter(torch.randn(8, 72))
        self.scale = nn.Parameter(torch.ones(72))

    def forward(self, x):
        return F.linear(x, self.gate[1]) @ self.down * self.scale


class Attention(nn.MultiheadAttention):
    """Self attention of one argument."""

    def __init__(self):
        super().__init__(8, 2, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


KINDS = {
    "linear": (lambda: nn.Linear(71, 8), (), torch.float32),
    "subclass": (lambda: Projection(71, 8), (), torch.float32),
    "conv1d": (lambda: Conv1D(8, 71), (), torch.float32),
    "embedding": (lambda: nn.Embedding(50, 71), ("weight",), torch.int64),
    "two-weights": (Gated, ("gate", "down"), torch.float32),
    "attention": (Attention, ("in_proj_weight",), torch.float32),
}


class Case:
    """One kind of module in one format."""

    def __init__(self, kind, weight_format):
        self.make, self.named, self.dtype = KINDS[kind]
        self.weight_format = weight_format
        self.x = {"embedding": torch.tensor([[4, 2, 4]]), "attention": torch.randn(2, 3, 8)}.get(
            kind, torch.randn(2, 71)
        )

    def quantized(self, module=None):
        config = QuantizationConfig(self.weight_format, also_quantize=self.named)
        return load_and_quantize_model(module or self.make(), None, config, "cpu")


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def weight_format(request):
    return request.param


# Every kind in one format, and every format in two kinds.
CASES = [(kind, "nf4-double") for kind in KINDS]
CASES += [(kind, name) for kind in ("linear", "two-weights") for name in FORMATS if name != "nf4-double"]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    kind, name = request.param
    return Case(kind, FORMATS[name])


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module, state):
    own = module.state_dict()
    return own.keys() == state.keys() and all(
        own[name].dtype == tensor.dtype and torch.equal(own[name], tensor) for name, tensor in state.items()
    )


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
    "a-list-of-two": lambda module: copy.deepcopy(nn.ModuleList([module, module]))[1],
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_and_shares_nothing(how, case):
    module = case.quantized()
    out, state = module(case.x), state_of(module)
    other = COPIES[how](module)
    assert type(other) is type(module)
    assert isinstance(other, type(case.make()))
    assert isinstance(other, QuantizedModule)
    assert other.descriptions == module.descriptions
    assert same_state(other, state)
    assert torch.equal(other(case.x), out)
    for leaf in other.descriptions:
        getattr(other, leaf).zero_()
    assert same_state(module, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_keeps_every_bit_of_a_weight_and_moves_its_dtype(dtype, case):
    module = case.quantized()
    state = state_of(module)
    module.to(dtype)
    for name in module.state_spec().keys() - {QUANT_STATE}:
        assert torch.equal(module.state_dict()[name], state[name])
        assert module.state_dict()[name].dtype == state[name].dtype
    assert decode_quant_state(module.state_dict()[QUANT_STATE], QUANT_STATE) == module.descriptions
    assert {getattr(module, leaf).dtype for leaf in module.descriptions} == {dtype}
    assert module(case.x if case.dtype == torch.int64 else case.x.to(dtype)).dtype == dtype
    module.float()
    assert all(torch.equal(module.state_dict()[name], state[name]) for name in module.state_spec())
    assert {getattr(module, leaf).dtype for leaf in module.descriptions} == {torch.float32}


def test_no_tensor_of_a_weight_is_floating_point_or_trains(case):
    module = case.quantized()
    for name in module.state_spec():
        parameter = module.get_parameter(name)
        assert type(parameter) is nn.Parameter
        assert not parameter.is_floating_point()
        assert not parameter.requires_grad
    assert module.state_spec().keys() <= module.state_dict().keys()
    assert not module.descriptions.keys() & module.state_dict().keys()


def test_its_repr_says_what_each_weight_is_quantized_to(case):
    module = case.quantized()
    assert repr(module).count(f"format={case.weight_format.name}, ") == len(module.descriptions)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_dict_of_the_same_format_is_taken_bit_for_bit(assign, case):
    source, module = case.quantized(), case.quantized()
    assert module.load_state_dict(source.state_dict(), assign=assign) == ([], [])
    assert same_state(module, source.state_dict())
    assert torch.equal(module(case.x), source(case.x))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_dict_of_float_weights_is_quantized_as_a_load_quantizes(assign, case):
    plain, module = case.make(), case.quantized()
    floats = state_of(plain)
    assert module.load_state_dict(plain.state_dict(), assign=assign) == ([], [])
    assert same_state(module, case.quantized(plain).state_dict())
    assert floats.keys() == case.make().state_dict().keys()  # the caller's dict is left as it is


def test_one_of_two_float_weights_may_come_alone(weight_format):
    case = Case("two-weights", weight_format)
    module = case.quantized()
    before, gate = state_of(module), torch.randn(3, 8, 71)
    missing, unexpected = module.load_state_dict({"gate": gate}, strict=False)
    assert not unexpected
    assert {name.partition("_")[0] for name in missing} == {"down", "scale"}
    expected = weight_format.quantize(gate)
    for name, tensor in before.items():
        leaf, _, part = name.partition("_")
        assert torch.equal(module.state_dict()[name], expected[part] if leaf == "gate" else tensor), name


@pytest.mark.parametrize(
    "down", [torch.zeros(3, 3), torch.full((8, 72), float("nan")), torch.zeros(8, 72).int()], ids=str
)
def test_a_weight_that_is_refused_keeps_the_others_from_being_taken(down, weight_format):
    case = Case("two-weights", weight_format)
    module = case.quantized()
    before = state_of(module)
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for QuantizedGated"):
        module.load_state_dict({**case.make().state_dict(), "down": down})
    assert same_state(module, before)


def linear(weight_format, **settings):
    return load_and_quantize_model(nn.Linear(71, 8), None, QuantizationConfig(weight_format, **settings), "cpu")


@pytest.mark.parametrize(
    "own, other",
    [
        (FP4(), NF4()),
        (NF4(), FP4()),
        (FP4(double_quant=True), NF4(double_quant=True)),
        (Int8(), Int8(threshold=0.0)),
        (Int8(threshold=2.0), Int8()),
    ],
    ids=str,
)
def test_a_module_becomes_what_a_state_dict_of_the_same_tensors_says(own, other):
    module, source, x = linear(own), linear(other, compute_dtype=torch.bfloat16), torch.randn(3, 71)
    module.load_state_dict(source.state_dict())
    assert module.format == other
    assert module.description == source.description
    assert torch.equal(module(x), source(x))
    assert torch.equal(module.weight.dequantize(), source.dequantize())
    assert same_state(copy.deepcopy(module), source.state_dict())


def edit(source, **changes):
    return {name: tensor for name, tensor in {**source, **changes}.items() if tensor is not None}


REFUSED = {
    "another block size": (lambda: linear(NF4(block_size=32)).state_dict(), "block_size': 32.*block_size': 64"),
    "double quantization": (
        lambda: linear(NF4(double_quant=True)).state_dict(),
        "'double_quant': True.* False",
    ),
    "another format": (lambda: linear(Int8()).state_dict(), "'int8'.*'nf4'"),
    "another shape of floats": (
        lambda: {"weight": torch.zeros(8, 72)},
        r"weight: expected shape \[8, 71\], got \[8, 72\]",
    ),
    "no quant_state": (
        lambda: edit(linear(NF4()).state_dict(), quant_state=None),
        "holds the quantized weight and no quant_state that describes it",
    ),
    "floats and state": (
        lambda: edit(linear(NF4()).state_dict(), weight=torch.zeros(8, 71)),
        "holds both weight and weight_packed: drop one of them",
    ),
    "floating scales": (
        lambda: edit(linear(NF4()).state_dict(), weight_absmax=torch.zeros(8, 2)),
        r"weight_absmax: expected torch\.int32 \[8, 2\], got torch\.float32 \[8, 2\]",
    ),
    "a garbled quant_state": (
        lambda: edit(linear(NF4()).state_dict(), quant_state=torch.zeros(256, dtype=torch.uint8)),
        "quant_state of the state dict is not a description",
    ),
    "NaN": (lambda: {"weight": torch.full((8, 71), float("nan"))}, "holds NaN or Inf cannot be quantized"),
    "integers": (lambda: {"weight": torch.zeros(8, 71, dtype=torch.int64)}, "expected floating-point numbers"),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
@pytest.mark.parametrize("reason", REFUSED)
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_is_taken(reason, strict):
    state, message = REFUSED[reason]
    module = linear(NF4())
    before = state_of(module)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state(), strict=strict)
    assert same_state(module, before)


def test_compiling_and_exporting_a_module_that_reads_its_weights(weight_format):
    case = Case("two-weights", weight_format)
    module = case.quantized()
    expected = module(case.x)
    near = {"rtol": 1e-4, "atol": 1e-4} if weight_format.name != "int8" else {"rtol": 0.1, "atol": 1.0}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x), expected, **near)
    program = torch.export.export(module, (case.x,))
    torch.testing.assert_close(program.module()(case.x), expected, **near)


def test_functional_call_takes_the_parameters_that_a_module_enumerates(case):
    source, module = case.quantized(), case.quantized()
    before = state_of(module)
    out = torch.func.functional_call(module, dict(source.named_parameters()), (case.x,))
    assert torch.equal(out, source(case.x))
    assert same_state(module, before)
