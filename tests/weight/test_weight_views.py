"""Views of a quantized weight: what is written to one reaches the weight, whichever function of torch made it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bigq import NF4, Int8
from one_weight import Holder, near, quantized

LOST = [
    "w.diagonal().fill_(1.0)", "w.movedim(0, 1).mul_(2)", "w.vsplit([1])[0].mul_(2)", "w.hsplit([1])[0].mul_(2)",
    "w.ravel().mul_(2)", "w.expand_as(torch.ones(9, 9)).mul_(2)", "w.as_strided((2,), (1,)).fill_(1.0)",
    "w.unfold(0, 2, 2).mul_(2)", "w.adjoint().mul_(2)", "w.mH.mul_(2)", "w.broadcast_to((1, 9, 9)).mul_(2)",
    "torch.ravel(w).mul_(2)", "torch.moveaxis(w, 0, 1).mul_(2)", "torch.atleast_3d(w).mul_(2)", "w.real.mul_(2)",
]  # fmt: skip


@pytest.mark.parametrize("statement", LOST)
def test_a_write_through_a_view_is_not_lost(statement):
    module = quantized(Holder(9, 9), Int8())
    dense = module.weight.dequantize()
    for weight in (dense, module.weight):
        exec(statement, {"torch": torch, "w": weight})
    assert near(module.weight.dequantize(), dense)


def test_a_view_as_complex_numbers_is_complex():
    module = quantized(Holder(9, 2), Int8())
    got = torch.view_as_complex(module.weight)
    assert torch.equal(got, torch.view_as_complex(module.weight.dequantize()))


@pytest.mark.parametrize("statement", ["w.reshape(-1)[:5].mul_(2)", "w.flatten().mul_(2)", "w.view(-1).mul_(2)"])
def test_a_write_to_a_flat_view_of_a_conv1d_is_not_lost(statement):
    module = quantized(Conv1D(9, 71), Int8())
    dense = module.weight.dequantize().contiguous()
    for weight in (dense, module.weight):
        exec(statement, {"w": weight})
    assert near(module.weight.dequantize(), dense)


def test_a_flat_view_of_a_conv1d_can_be_read():
    weight = quantized(Conv1D(9, 71)).weight
    assert weight.is_contiguous()
    assert torch.equal(weight.view(-1) + 0, weight.dequantize().reshape(-1))


def test_an_initialization_of_a_conv1d_gives_what_it_gives_a_plain_one():
    module, dense = quantized(Conv1D(9, 71), Int8()), torch.empty(71, 9)
    for weight in (dense, module.weight):
        torch.manual_seed(1)
        nn.init.normal_(weight)
    assert near(module.weight.dequantize(), dense)


@pytest.mark.parametrize("where", [(4, 2), (1, -1), (-1, 2), (3, 100)], ids=str)
def test_tensor_split_at_indices_that_go_back_or_beyond(where):
    weight = quantized(Holder(9, 71)).weight
    for got, expected in zip(weight.tensor_split(where), weight.dequantize().tensor_split(where), strict=True):
        assert torch.equal(got + 0, expected)


def test_transpose_takes_its_dimensions_by_name():
    weight = quantized(Holder(9, 71)).weight
    assert torch.equal(torch.transpose(weight, dim0=0, dim1=1) + 0, weight.dequantize().T)
    assert torch.equal(torch.swapaxes(weight, axis0=0, axis1=1) + 0, weight.dequantize().T)


def test_zeros_like_keeps_the_strides():
    weight = quantized(Holder(9, 71)).weight
    assert torch.zeros_like(weight.T).stride() == torch.zeros_like(weight.dequantize().T).stride() == (1, 71)


def test_quantizing_int8_numbers_again_keeps_their_bits():
    """RWKV divides weights by 1 in its first forward: what is saved then differs from what is reloaded and run."""
    module = quantized(Holder(64, 71), Int8())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.weight.div_(1)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("statement", ["w.t().reshape(-1)", "w.t().flatten()", "w.t().reshape_as(torch.ones(9, 142))"])
def test_a_reshape_that_copies_in_torch_is_a_copy(statement):
    module = quantized(Holder(18, 71), Int8())
    before = module.weight.dequantize()
    got = eval(statement, {"torch": torch, "w": module.weight})
    assert torch.equal(got, eval(statement, {"torch": torch, "w": before}))
    got.zero_()
    assert not got.any()
    assert torch.equal(module.weight.dequantize(), before)


def test_mm_takes_its_arguments_by_name_and_refuses_more_dimensions():
    weight, x = quantized(Holder(9, 64)).weight, torch.randn(2, 64)
    assert near(torch.mm(x, mat2=weight.t()), x @ weight.dequantize().t())
    with pytest.raises(RuntimeError):
        torch.mm(x[None], weight.t())


@pytest.mark.parametrize("weight_format", ["nf4", "nf4-double", "int8"])
def test_rows_in_other_groups_stay_quantized(weight_format):
    """As DBRX reads its experts, which lie one below the other."""
    own = Int8() if weight_format == "int8" else NF4(double_quant=weight_format == "nf4-double")
    module = quantized(Holder(12, 71), own)
    dense, stack = module.weight.dequantize(), module.weight.view(3, 4, 71)
    assert torch.equal(stack[1] + 0, dense[4:8])
    assert stack[1].operand() is not None
    x = torch.randn(2, 71)
    assert torch.equal(x @ stack[2].T, x @ module.weight[8:].T)
    stack[0].mul_(2)
    assert near(module.weight.dequantize(), torch.cat([2 * dense[:4], dense[4:]]))
    assert module.weight.view(4, 3, 71).view(2, 6, 71)[1].operand().shape == (6, 71)
    assert module.weight.view(71, 12).operand() is None
    assert module.weight.T.reshape(71, 3, 4).shape == (71, 3, 4)
