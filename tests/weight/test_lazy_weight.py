"""LazyWeight: what is written to a weight, a view or a copy of it, and where that goes."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from bigq import NF4, ConfigError, QuantizedWeight, UnsupportedError
from bigq.system.internals import SEES_EDITS
from one_weight import FORMATS, Holder, TransposedExperts, quantized
from ranks import error_of, mesh_of, run_ranks

HOLDERS = {
    "square": lambda: Holder(9, 9),
    "wide": lambda: Holder(7, 71),
    "experts": lambda: Holder(7, 6, 70),
    "square conv1d": lambda: Conv1D(9, 9),
    "conv1d": lambda: Conv1D(71, 9),
    "transposed experts": lambda: TransposedExperts(7, 70, 6),
}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def layer(request):
    return quantized(nn.Linear(71, 7), request.param)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module, before):
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def requantized(dense, module):
    """What the format of `module` makes of the numbers `dense`."""
    description = module.descriptions["weight"]
    rows = dense.mT.contiguous() if description.transposed else dense
    state = description.format.quantize(rows)
    out = description.format.dequantize(state, description.shape, dense.dtype)
    return out.mT if description.transposed else out


def check(statement, module, label):
    dense = module.weight.dequantize().contiguous()
    for weight in (dense, module.weight):
        exec(statement, {"torch": torch, "nn": nn, "F": F, "w": weight})
    got, expected = module.weight.dequantize(), requantized(dense, module)
    # Quantizing again what was not written rounds a scale; nested scales are those of all blocks together.
    tolerance = 0.03 if "double" in label else 1e-6
    assert (got - expected).abs().max() <= tolerance * expected.abs().max(), f"{statement} of {label}"


WRITES = [
    "w.mul_(2)", "w.add_(1)", "w.add_(torch.ones_like(w), alpha=0.5)", "w.copy_(torch.full(w.shape, 0.5))",
    "w.zero_()", "w.fill_(0.25)", "w.sub_(1)", "w.div_(2)", "w.neg_()", "w.clamp_(-0.5, 0.5)",
    "w.lerp_(torch.zeros(w.shape), 0.5)", "w.addcmul_(torch.ones(w.shape), torch.ones(w.shape))",
    "w.masked_fill_(w < 0, 0.0)", "w.index_copy_(0, torch.tensor([1]), torch.ones(1, *w.shape[1:]))",
    "w.index_fill_(0, torch.tensor([1]), 0.5)", "w.index_add_(0, torch.tensor([1]), torch.ones(1, *w.shape[1:]))",
    "w.renorm_(2, 0, 1.0)", "torch.relu_(w)", "F.relu(w, inplace=True)", "w += 1", "w -= 1", "w *= 2", "w /= 2",
    "w **= 2", "w.data.mul_(2)", "w.detach().mul_(2)", "w.copy_(torch.ones(w.shape, dtype=torch.int32))",
    "w.copy_(torch.tensor(0.5))",
]  # fmt: skip
VIEW_WRITES = [
    "w.mT.mul_(2)", "w.mT.mT.mul_(2)", "w[1:3].mul_(2)", "w[2].fill_(1.0)", "w[-1].fill_(1.0)", "w[::2].fill_(1.0)",
    "w[..., 1].fill_(0.5)", "w[None].mul_(2)", "w[1:4][1].mul_(2)", "w.mT[1].mul_(2)", "w.chunk(2)[1].mul_(2)",
    "w.chunk(2, -1)[1].mul_(2)", "w.split(2)[1].zero_()", "w.split([1, len(w) - 1])[0].zero_()",
    "w.unbind()[1].zero_()", "w.unbind(-1)[1].zero_()", "list(w)[1].zero_()", "w.narrow(0, 1, 2).mul_(2)",
    "w.narrow(1, 1, 2).mul_(2)", "w.select(1, 1).mul_(2)", "w.swapaxes(0, 1).mul_(2)",
    "w.permute(*range(w.dim() - 1, -1, -1)).mul_(2)", "w.unsqueeze(0).squeeze(0).mul_(2)",
    "w.unflatten(0, (1, -1)).mul_(2)", "w.expand(1, *w.shape).mul_(2)", "w.view_as(torch.ones(w.shape)).mul_(2)",
    "w.tensor_split((1, 3))[1].zero_()", "w.contiguous().mul_(2)", "w[0:2].copy_(w[2:4])", "w[0].add_(w[1])",
    "w[0] += 1", "w[0:2] *= 2", "w.mT[..., 1] += 1",
]  # fmt: skip
ITEM_WRITES = [
    "w[1] = 2.0", "w[-1] = 2.0", "w[1:3] = 2.0", "w[1:3] = torch.ones(2, *w.shape[1:])",
    "w[1:3] = torch.ones(w.shape[-1])", "w[1, 2] = 2.0", "w[:, 2] = 0.5", "w[w < 0] = 0.0",
    "w[torch.tensor([0, 2])] = 1.0", "w[...] = 0.5", "w[0] = w[1]", "w[torch.tensor(1)] = 0.5", "w[[0, 1]] = 0.5",
    "w[torch.arange(len(w)) % 2 == 0] = 0.5", "w[0, None] = 0.5", "w.mT[..., 1, :] = 0.5", "w.mT[1] = 0.5",
    "w[True] = 0.5", "w[0] = torch.ones(w.shape[1:], dtype=torch.int32)",
]  # fmt: skip
FUNCTION_WRITES = [
    "nn.init.ones_(w)", "nn.init.zeros_(w)", "nn.init.constant_(w, 0.3)", "nn.init.ones_(w[1:3])",
    "nn.init.constant_(w.mT, 0.3)", "torch.add(torch.ones(w.shape), 1, out=w)", "torch.mul(w, 2, out=w)",
    "torch.lerp(w, torch.zeros(w.shape), 0.5, out=w)", "torch._foreach_mul_([w], 2.0)", "torch._foreach_zero_([w])",
    "torch._foreach_add_([w], [torch.ones(w.shape)])", "torch._foreach_copy_([w], [torch.ones(w.shape)])",
]  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    """A module of each kind in NF4 and one in each format, to copy."""
    torch.manual_seed(0)
    kinds = {f"{kind} in nf4": quantized(make(), NF4()) for kind, make in HOLDERS.items()}
    return kinds | {f"wide in {name}": quantized(Holder(7, 71), fmt) for name, fmt in FORMATS.items()}


@pytest.mark.parametrize("statement", WRITES + VIEW_WRITES + ITEM_WRITES + FUNCTION_WRITES)
def test_what_is_written_to_a_weight_or_a_view_is_quantized_into_the_module(statement, modules):
    for label, module in modules.items():
        check(statement, deepcopy(module), label)


@pytest.mark.parametrize("name", ["normal_", "uniform_", "kaiming_uniform_", "xavier_normal_", "orthogonal_"])
def test_an_initialization_quantizes_its_numbers(name, layer):
    dense = nn.Parameter(torch.empty(7, 71))
    for weight in (dense, layer.weight):
        torch.manual_seed(1)
        getattr(nn.init, name)(weight)
    expected = requantized(dense.detach(), layer)
    assert (layer.dequantize() - expected).norm() <= (
        0.01 if "double_quant=True" in repr(layer) else 1e-6
    ) * expected.norm()


def test_rows_that_are_not_written_keep_their_bits():
    layer = quantized(nn.Linear(71, 7), NF4())
    before = state_of(layer)
    layer.weight[2:4] = 0.5
    for name in ("weight_packed", "weight_absmax"):
        kept = [0, 1, 4, 5, 6]
        assert torch.equal(layer.state_dict()[name][kept], before[name][kept])
    assert layer.dequantize()[2:4].unique().tolist() == [0.5]


# Assignment


def test_data_takes_the_numbers_and_the_dtype_of_what_is_assigned(layer):
    numbers = torch.randn(7, 71).half()
    layer.weight.data = numbers
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.dequantize(torch.float32), requantized(numbers.float(), layer))


@pytest.mark.parametrize(
    "assigned", [nn.Parameter, lambda numbers: numbers, nn.Buffer], ids=["Parameter", "Tensor", "Buffer"]
)
def test_assigning_to_the_attribute_quantizes(assigned, layer):
    numbers = torch.randn(7, 71)
    names = list(layer.state_dict())
    layer.weight = assigned(numbers)
    assert torch.equal(layer.dequantize(), requantized(numbers, layer))
    assert list(layer.state_dict()) == names
    assert isinstance(layer.weight, QuantizedWeight)


@pytest.mark.parametrize(
    "statement", ["m.weight += d", "m.weight.data += d", "m.weight.data = m.weight.data + d", "m.weight.data.add_(d)"]
)
def test_a_delta_is_added_once(statement, layer):
    dense, delta = layer.dequantize(), torch.randn(7, 71) * 0.1
    exec(statement, {"m": layer, "d": delta})
    assert torch.equal(layer.dequantize(), requantized(dense + delta, layer))


def test_a_weight_assigned_to_another_of_its_format_is_tied_to_it_as_in_torch(layer):
    other = quantized(nn.Linear(71, 7), layer.format)
    other.weight = layer.weight
    for name in layer.state_spec():
        assert torch.equal(other.state_dict()[name], layer.state_dict()[name])
    other.weight.zero_()
    assert layer.dequantize().norm() == 0  # the memory is shared
    assert other.weight_packed is layer.weight_packed


def test_a_weight_assigned_to_itself_stays_what_it_is(layer):
    before = state_of(layer)
    layer.weight = layer.weight
    layer.weight.data = layer.weight.data
    assert unchanged(layer, before)
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    before["quant_state"] = layer.quant_state.clone()  # it says the dtype
    assert unchanged(layer, before)
    assert layer.weight.dtype == torch.bfloat16


# Refusals


@pytest.mark.parametrize(
    "statement, message",
    [
        ("m.weight = torch.full((7, 71), float('nan'))", "holds NaN or Inf cannot be quantized"),
        ("m.weight.data = torch.full((7, 71), float('inf'))", "holds NaN or Inf cannot be quantized"),
        ("m.weight.mul_(float('nan'))", "holds NaN or Inf cannot be quantized"),
        ("m.weight[2:4].fill_(float('inf'))", "holds NaN or Inf cannot be quantized"),
        ("m.weight[1] = float('nan')", "holds NaN or Inf cannot be quantized"),
        ("m.weight.T[1].fill_(float('nan'))", "holds NaN or Inf cannot be quantized"),
        ("m.weight = torch.zeros(71, 7)", r"shape \[7, 71\] is given a tensor of shape \[71, 7\]"),
        ("m.weight.data = torch.zeros(71)", r"shape \[7, 71\] is given a tensor of shape \[71\]"),
        ("m.weight = torch.zeros(7, 71, dtype=torch.int32)", r"given torch\.int32; expected floating-point numbers"),
        ("m.weight.data = torch.zeros(7, 71, dtype=torch.bool)", r"given torch\.bool; expected floating-point numbers"),
        ("m.weight = None", "is given None; expected a tensor"),
        ("m.weight = 0.5", r"is given 0\.5; expected a tensor"),
    ],
)
def test_what_cannot_be_quantized_is_refused_and_changes_nothing(statement, message, layer):
    before = state_of(layer)
    with pytest.raises(ConfigError, match=message):
        exec(statement, {"m": layer, "torch": torch})
    assert unchanged(layer, before)


@pytest.mark.parametrize(
    "statement",
    ["w[7] = 1.0", "w[0, 71]", "w[1:3] = torch.ones(5)", "w.copy_(torch.ones(3))", "w.add_(torch.ones(2, 7, 71))"],
)
def test_what_torch_refuses_is_refused_and_changes_nothing(statement, layer):
    before = state_of(layer)
    with pytest.raises((IndexError, RuntimeError)):
        exec(statement, {"w": layer.weight, "torch": torch})
    assert unchanged(layer, before)


# Copies


COPIES = {
    "to-dtype": lambda weight: weight.to(torch.float64),
    "double": lambda weight: weight.double(),
    "type": lambda weight: weight.type(torch.float64),
    "to-other": lambda weight: weight.to(torch.zeros(1, dtype=torch.float64)),
    "copy": lambda weight: weight.to(torch.float32, copy=True),
    "clone": lambda weight: weight.clone(),
    "transposed-contiguous": lambda weight: weight.T.contiguous(),
    "fancy-index": lambda weight: weight[torch.arange(7)],
}


@pytest.mark.parametrize("name", COPIES)
def test_what_is_written_to_a_copy_never_reaches_the_module(name, layer):
    before, dense = state_of(layer), layer.dequantize()
    copy = COPIES[name](layer.weight)
    copy.mul_(0.5)
    copy[0] = 3.0
    assert unchanged(layer, before)
    expected = (dense.T if name.startswith("transposed") else dense).to(copy.dtype) * 0.5
    expected[0] = 3.0
    torch.testing.assert_close(copy + 0, expected, rtol=1e-6, atol=1e-6)


def test_a_copy_takes_numbers_and_is_copied_as_a_tensor_is(layer):
    before, numbers = state_of(layer), torch.randn(7, 71).bfloat16()
    copy = layer.weight.to(torch.bfloat16)
    copy.data = numbers
    assert torch.equal(copy + 0, numbers)
    assert torch.equal(copy.to(torch.float32) + 0, numbers.float())
    with pytest.raises(ConfigError, match=r"shape \[7, 71\] is given a tensor of shape \[3, 3\]"):
        copy.data = torch.zeros(3, 3)
    assert torch.equal(copy + 0, numbers)
    assert layer.weight.to("meta").is_meta
    assert unchanged(layer, before)


@pytest.mark.parametrize("name", ["to-dtype", "double", "type", "to-other"])
def test_a_copy_that_is_read_after_the_weight_changed_raises(name, layer):
    copy = COPIES[name](layer.weight)
    view = copy[1:3]
    before = COPIES[name](layer.dequantize())
    layer.weight.mul_(2)
    if not SEES_EDITS:  # then a copy has memory of its own
        assert torch.equal(copy + 0, before)
        assert torch.equal(view + 0, before[1:3])
        return
    for stale in (copy, view):
        with pytest.raises(UnsupportedError, match=r"read after the weight has changed: call weight\.dequantize\(\)"):
            stale + 0
        with pytest.raises(UnsupportedError, match="read after the weight has changed"):
            F.linear(torch.ones(1, 71), stale)


def _copy_of_shards(rank):
    """What a copy of a weight in shards says when it is read, before and after the weight has changed."""
    from torch.distributed.fsdp import fully_shard

    layer = quantized(nn.Linear(71, 7), NF4())
    expected = layer.dequantize().half()
    fully_shard(layer, mesh=mesh_of(1))
    copy = layer.weight.half()
    same = torch.equal((copy + 0).full_tensor(), expected)
    layer.write_weight("weight", layer.dequantize() * 2)
    return same, error_of(lambda: copy + 0)


@pytest.mark.skipif(not SEES_EDITS, reason="a copy has memory of its own then")
def test_a_copy_of_shards_that_is_read_after_the_weight_changed_raises(tmp_path):
    ((same, said),) = run_ranks(_copy_of_shards, tmp_path, world=1)
    assert same
    assert said.startswith("UnsupportedError: a copy of a quantized weight, made by .to()")


def test_a_copy_of_the_same_dtype_and_device_is_the_weight_as_in_torch(layer):
    for same in (layer.weight.to(torch.float32), layer.weight.float(), layer.weight.cpu(), layer.weight.to("cpu")):
        same.zero_()
    assert layer.dequantize().norm() == 0


def test_a_view_of_a_weight_sees_what_is_written_later(layer):
    view, swapped = layer.weight[1:3], layer.weight.T
    layer.weight.fill_(0.5)
    assert view.unique().tolist() == [0.5]
    assert swapped.unique().tolist() == [0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_cast_with_a_memory_format_has_the_same_numbers(dtype):
    module = quantized(Holder(4, 3, 2, 2))
    got = module.weight.to(dtype, memory_format=torch.channels_last)
    assert torch.equal(got.dequantize(), module.weight.dequantize(dtype))
