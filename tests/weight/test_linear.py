"""QuantizedLinear: an nn.Linear whose state survives casts, copies and state dicts."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bigq import QuantizedLinear, UnsupportedError
from bigq.formats import FP4, NF4, Description, Int8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [NF4(), FP4(block_size=32, double_quant=True), Int8()]


def make(fmt, weight=None, bias=True, compute_dtype=None):
    weight = torch.randn(12, 72, device=DEVICE) if weight is None else weight
    description = Description(format=fmt, shape=tuple(weight.shape), dtype=weight.dtype, compute_dtype=compute_dtype)
    layer = QuantizedLinear(description, bias=torch.float32 if bias else None, device=DEVICE)
    layer.load_state_dict({**layer.quantize(weight), **({"bias": torch.randn(12)} if bias else {})})
    return layer


@pytest.fixture(params=FORMATS, ids=lambda fmt: fmt.name)
def layer(request):
    return make(request.param)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_weight_without_rows_has_gradients(fmt):
    layer = make(fmt, torch.randn(0, 72, device=DEVICE), bias=False)
    layer.bias = nn.Parameter(torch.randn(0, device=DEVICE))
    x = torch.randn(2, 3, 72, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert layer.bias.grad.shape == (0,)


def test_is_a_linear_of_plain_frozen_parameters(layer):
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (72, 12)
    assert not dict(layer.named_buffers())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    assert all(type(p) is nn.Parameter for p in layer.parameters())
    assert not any(p.is_floating_point() for name, p in layer.named_parameters() if name != "bias"), "nothing to cast"


def test_forward_is_the_product_with_dequantize(layer):
    x = torch.randn(2, 3, 72, device=DEVICE)
    expected = torch.nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert ((layer(x) - expected).norm() / expected.norm()).item() < (1e-5 if "int8" not in str(layer) else 1e-2)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_touch_the_bias_only(layer, cast):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    del before["bias"], before["quant_state"]  # which says the dtype
    getattr(layer, cast)()
    for name, tensor in before.items():
        assert torch.equal(layer.state_dict()[name], tensor)
        assert layer.state_dict()[name].dtype == tensor.dtype
    assert layer.bias.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}.get(
        cast, torch.float64
    )


def test_moves_follow_the_model(layer):
    model = nn.Sequential(layer).to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model[0].weight_absmax.dtype in (torch.int32, torch.uint8)
    assert model[0].absmax.dtype == torch.float32


def test_state_dict_round_trip(layer):
    other = make(layer.format)
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    x = torch.randn(4, 72, device=DEVICE)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(layer, clone):
    other = clone(layer)
    x = torch.randn(4, 72, device=DEVICE)
    assert torch.equal(other(x), layer(x))
    assert other.description == layer.description


def test_compute_dtype_and_output_dtype():
    layer = make(FORMATS[0], compute_dtype=torch.bfloat16)
    x = torch.randn(4, 72, device=DEVICE)
    out = layer(x)
    assert out.dtype == torch.float32
    plain = make(FORMATS[0])
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(out, plain(x.bfloat16()).float())


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_autocast_decides_as_it_does_for_linear(layer, compute_dtype):
    """Its dtype is that of the result. What an op computes in float32 stays float32."""
    layer.compute_dtype = compute_dtype
    x = torch.randn(4, 72, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16() if compute_dtype is None else x).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_every_dtype_comes_out_as_of_linear(layer, dtype):
    x = torch.randn(4, 72, device=DEVICE, dtype=dtype)
    plain = nn.Linear(72, 12, device=DEVICE, dtype=dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad():
        out, expected = layer(x), plain(x)
    assert out.dtype == expected.dtype


def test_integer_activations_are_refused(layer):
    with pytest.raises(
        UnsupportedError, match=r"a quantized weight is multiplied by activations of torch\.uint8; .*skip_modules"
    ):
        layer(torch.zeros(2, 72, dtype=torch.uint8, device=DEVICE))


def test_gradients_flow_through_frozen_weights(layer):
    x = torch.randn(4, 72, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantize().sum(dim=0).expand(4, 72)
    torch.testing.assert_close(x.grad, expected)
    assert layer.weight.grad is None
    assert layer.bias.grad.tolist() == [4.0] * 12


@pytest.mark.slow
def test_compiles_without_graph_breaks(layer):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (2, 5, 9):
        x = torch.randn(tokens, 72, device=DEVICE)
        torch.testing.assert_close(compiled(x), layer(x))
    (graph,) = graphs  # one for every number of tokens
    assert sum("bigq.linear" in str(node.target) for node in graph.graph.nodes) == 1


def test_exports(layer):
    x = torch.randn(2, 72, device=DEVICE)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_exports_with_any_number_of_tokens(layer):
    x = torch.randn(3, 72, device=DEVICE)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (2, 8):
        x = torch.randn(tokens, 72, device=DEVICE)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_reset_parameters_keeps_the_weight(layer):
    before = layer.weight_packed.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight_packed, before)


def test_repr_says_the_format(layer):
    assert f"in_features=72, out_features=12, bias=True, format={layer.format.name}" in repr(layer)
