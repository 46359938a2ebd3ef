"""QuantizedWeight: every expression of a quantized weight gives what it gives for the dequantized weight."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from bigq import Int8, QuantizedWeight, UnsupportedError
from bigq.formats import Block4
from one_weight import FORMATS, Holder, TransposedExperts, quantized

HOLDERS = {
    "square": lambda: Holder(9, 9),
    "wide": lambda: Holder(7, 71),
    "experts": lambda: Holder(7, 6, 70),
    "conv1d": lambda: Conv1D(71, 9),
    "transposed-experts": lambda: TransposedExperts(7, 70, 6),
}


@pytest.fixture(scope="module")
def modules():
    """A module of each kind in each format, to read."""
    torch.manual_seed(0)
    return {
        f"{kind} in {name}": quantized(make(), weight_format)
        for kind, make in HOLDERS.items()
        for name, weight_format in FORMATS.items()
    }


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def layer(request):
    return quantized(nn.Linear(71, 7), request.param)


@pytest.fixture
def decoded(monkeypatch):
    """The shapes that a format was asked to dequantize, in order."""
    shapes = []

    def spy(kind):
        original = kind.dequantize

        def dequantize(self, state, shape, dtype):
            shapes.append(tuple(shape))
            return original(self, state, shape, dtype)

        monkeypatch.setattr(kind, "dequantize", dequantize)

    spy(Block4)
    spy(Int8)
    return shapes


def same(got, expected):
    """Whether two results are alike: shape, dtype and every number."""
    if isinstance(expected, (tuple, list)):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, torch.Tensor):
        got = got.dequantize() if isinstance(got, QuantizedWeight) else got
        return got.dtype == expected.dtype and torch.equal(got, expected)
    return got == expected


def evaluate(expression, weight):
    return eval(expression, {"torch": torch, "F": F, "np": np, "w": weight})


def check(expression, modules, is_same=same):
    for name, module in modules.items():
        dense = module.weight.dequantize().contiguous()
        assert is_same(evaluate(expression, module.weight), evaluate(expression, dense)), f"{expression} of {name}"
        assert torch.equal(module.weight.dequantize(), dense), f"{expression} changed {name}"


DESCRIBED = [
    "w.shape", "w.size()", "w.size(-1)", "w.dim()", "w.ndim", "w.numel()", "w.nelement()", "len(w)", "w.dtype",
    "w.device", "w.layout", "w.nbytes", "w.element_size()", "w.itemsize", "w.stride()", "w.is_contiguous()",
    "w.is_cuda", "w.is_meta", "w.is_leaf", "w.requires_grad", "w.grad", "w.grad_fn", "w.get_device()",
    "w.is_floating_point()", "torch.is_floating_point(w)", "torch.is_tensor(w)", "w.is_sparse", "w.is_nested",
    "w.is_complex()", "w.is_inference()", "w.mT.shape", "w.mT.stride()", "w.mT.is_contiguous()", "w[1:3].stride()",
    "isinstance(hash(w), int)", "w.new_full((3,), 0.5)", "w.new_zeros(2, 3)", "w.new_ones((2,), dtype=torch.half)",
    "w.new_tensor([1.0, 2.0])", "torch.zeros_like(w)", "torch.ones_like(w, dtype=torch.half)",
    "torch.full_like(w, 2.0)", "torch.zeros_like(w.mT)", "torch.result_type(w, 1)",
    "torch.ones(2, dtype=torch.half).to(w)", "torch.ones(2, dtype=torch.half).type_as(w)",
]  # fmt: skip


@pytest.mark.parametrize("expression", DESCRIBED)
def test_what_describes_a_weight_decodes_nothing(expression, modules, decoded):
    for module in modules.values():
        evaluate(expression, module.weight)
    assert not decoded
    check(expression, modules)


INDEXED = [
    "w[3]", "w[-2]", "w[2:5]", "w[-4:-1]", "w[1:6:2]", "w[3:3]", "w[2:100]", "w[:]", "w[5:2]", "w[2, 3]",
    "w[1:4, 2:5]", "w[:, 3]", "w[:, -1]", "w[2, 1:4]", "w[-1, None]", "w[None]", "w[:, None]", "w[...]", "w[..., 1]",
    "w[1, ...]", "w[()]", "w[torch.tensor(2)]", "w[torch.tensor(-2)]", "w[torch.tensor([1, -1, 0])]",
    "w[torch.tensor([[1, 0], [2, -1]])]", "w[torch.tensor([1, 2], dtype=torch.int32)]",
    "w[torch.tensor([], dtype=torch.long)]", "w[torch.tensor([0, 1]), torch.tensor([1, 2])]",
    "w[torch.tensor([0, 1]), 1:3]", "w[torch.tensor(1), 2:4]", "w[:, torch.tensor([0, 1])]",
    "w[torch.arange(len(w)) % 2 == 0]", "w[w > 0]", "w[[0, 2]]", "w[True]", "w[np.int64(2)]", "w.mT[1]",
    "w.mT[..., 1:3].mT", "w[1:5][1][2:4]", "w.mT[2:4].mT", "w.chunk(2)[1].mT", "w.mT.chunk(2)[1]",
]  # fmt: skip


@pytest.mark.parametrize("expression", INDEXED)
def test_an_index_gives_what_it_gives_for_the_dequantized_weight(expression, modules):
    check(expression, modules)


VIEWED = [
    "w.chunk(3)", "w.chunk(3, dim=1)", "torch.chunk(w, 2, -1)", "w.split(2)", "w.split(3, 1)",
    "w.split([1, len(w) - 1])", "torch.split(w, [2, len(w) - 2], dim=0)", "w.tensor_split(3)",
    "w.tensor_split((1, 3))", "w.vsplit([1])", "w.hsplit([1])", "w.unbind()", "w.unbind(1)", "w.unbind(-1)",
    "torch.unbind(w, dim=0)", "list(w)", "w.mT", "w.mT.mT", "w.transpose(0, 1)", "w.transpose(-1, -2)",
    "w.transpose(0, 0)", "w.transpose(-1, -1)", "w.swapaxes(0, -1)", "w.permute(*range(w.dim() - 1, -1, -1))",
    "w.movedim(0, 1)", "w.adjoint()", "w.view(torch.int32)", "w.unsqueeze(0)", "w.squeeze()", "w.narrow(0, 1, 2)",
    "w.narrow(1, 1, 2)", "w.select(0, 1)", "w.select(1, 1)", "w.diagonal()", "w.expand(2, *w.shape)",
    "w.unflatten(-1, (1, -1))", "w.unfold(0, 2, 1)", "w.reshape(-1, w.shape[-1])", "w.flatten()", "w.contiguous()",
    "w.mT.contiguous()", "w.mT.reshape(-1)",
]  # fmt: skip


@pytest.mark.parametrize("expression", VIEWED)
def test_a_view_has_the_numbers_of_the_same_view_of_the_dequantized_weight(expression, modules):
    check(expression, modules)


DENSE = [
    "w + 0", "1 - w", "-w", "abs(w)", "w * w", "w == w", "w > 0", "w.max()", "w.argmax()", "w.isfinite().all()",
    "torch.where(w > 0, w, 0)", "torch.einsum('...ij->...ji', w)", "torch.cat([w, w])", "torch.stack([w, w])",
    "w.clone()", "w.tolist()", "w.numpy().tolist()", "np.asarray(w).tolist()", "float(w.flatten()[0])",
    "bool(w.flatten()[0])", "w.index_select(0, torch.tensor([1, 0]))", "w.masked_select(w > 0)", "torch.equal(w, w)",
    "torch.allclose(w, w)", "w.repeat(2, *[1] * (w.dim() - 1))", "w.sort()[0]", "w.float()", "w.int()", "w.bool()",
    "w.to('cpu')", "w.to(torch.float32, copy=True)", "w.to(torch.int64)", "w.type(torch.float64)", "w.type()",
    "w.double().mT", "w.data", "w.detach()", "F.pad(w, (1, 1))", "w.flip(0)", "w.nan_to_num()",
]  # fmt: skip


@pytest.mark.parametrize("expression", DENSE)
def test_any_other_function_gets_the_dequantized_weight(expression, modules):
    check(expression, modules)


SUMS = [
    "w.sum()",
    "w.sum(0)",
    "w.norm()",
    "torch.linalg.vector_norm(w, dim=1)",
    "w[0].sum()",
    "w.softmax(-1)",
]


@pytest.mark.parametrize("expression", SUMS)
def test_a_sum_is_that_of_the_dequantized_weight_whatever_the_order(expression, modules):
    check(expression, modules, torch.allclose)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_cast_weight_is_decoded_into_that_dtype(dtype, layer):
    cast = layer.weight.to(dtype)
    assert isinstance(cast, QuantizedWeight)
    assert cast.dtype == dtype
    assert torch.equal(cast.dequantize(), layer.dequantize(dtype))
    assert torch.equal(cast[2:4] + 0, layer.dequantize(dtype)[2:4])


def test_rows_are_decoded_alone(modules, decoded):
    weight = modules["wide in nf4-double"].weight
    for index in (torch.tensor([4, 2]), 3, slice(1, 3)):
        assert len(weight[index] + 0) in (2, 71)
    assert [shape[0] for shape in decoded] == [2, 1, 2]


def test_a_weight_says_what_it_is(modules):
    assert repr(modules["wide in fp4"].weight) == (
        "QuantizedWeight(format=fp4, block_size=32, double_quant=False, shape=[7, 71], torch.float32, cpu)"
    )
    assert repr(modules["conv1d in int8"].weight) == (
        "QuantizedWeight(format=int8, threshold=6.0, shape=[9, 71], torch.float32, cpu)"
    )


def test_a_weight_is_a_parameter_for_those_who_ask(layer):
    assert isinstance(layer.weight, torch.Tensor)
    assert not layer.weight.requires_grad
    assert layer.weight.detach() is not None
    assert layer.weight.requires_grad_(False).shape == (7, 71)


def test_a_gradient_is_refused(layer):
    with pytest.raises(UnsupportedError, match="no gradient: train an adapter"):
        layer.weight.requires_grad_()
    with pytest.raises(UnsupportedError, match="no gradient: train an adapter"):
        layer.weight.requires_grad = True


def test_an_address_is_refused(layer):
    with pytest.raises(UnsupportedError, match=r"no memory of its own: call weight\.dequantize\(\)"):
        layer.weight.data_ptr()


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy], ids=["deepcopy", "copy"])
def test_a_copy_of_a_weight_has_its_numbers(clone, layer):
    other = clone(layer.weight)
    assert torch.equal(other + 0, layer.dequantize())


def test_a_deepcopied_weight_is_a_plain_parameter(layer):
    other = copy.deepcopy({"a": layer.weight, "b": [layer.weight]})
    assert type(other["a"]) is nn.Parameter
    assert not other["a"].requires_grad
    assert torch.equal(other["a"], layer.dequantize())


def test_results_are_plain_tensors_that_share_no_memory_with_the_module(layer):
    before = layer.dequantize()
    for result in (layer.weight + 0, layer.weight.clone(), layer.weight[torch.tensor([0, 1])], layer.dequantize()):
        assert type(result) is torch.Tensor
        result.zero_()
    assert torch.equal(layer.dequantize(), before)
