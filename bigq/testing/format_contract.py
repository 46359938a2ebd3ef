"""check_format: whether a format keeps the contract of `bigq.formats.Format`, on which loading and saving rely."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq.formats import FORMATS, Format, make_format
from bigq.formats.base import State, matrix_shape
from bigq.testing.budget import assert_within_budget

__all__ = ["check_format"]

_SHAPES = ((8, 64), (3, 100), (5, 33), (1, 1), (7,), (), (2, 3, 40), (0, 64), (4, 0))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_format(
    weight_format: Format,
    *,
    shapes: Sequence[tuple[int, ...]] = _SHAPES,
    device: str | torch.device = "cpu",
    weight_error: float = 0.2,
    activation_error: float = 0.0,
    seed: int = 0,
) -> None:
    """Raise an AssertionError that says which part of the contract `weight_format` breaks, and where.

    It is checked that the state is what `state_spec` says, holds no floating-point numbers, and shares no storage; that
    rows are quantized by themselves, or in groups of `row_group`; that NaN and Inf are reported; that decoding rounds
    once; that each of its `methods` stores the same and is not worse than "absmax"; that parts of a weight decode to
    the parts of the whole; that products are those with the decoded weight; and that `describe` has every setting.

    Args:
        weight_format: the format, with its settings.
        shapes: shapes [..., K] of the weights to try, with normally distributed numbers.
        device: where to try them.
        weight_error: the largest allowed error of a decoded weight, relative to the weight, in the Frobenius norm.
        activation_error: the error that rounding the activations adds to a product, relative to the product.
        seed: of the random numbers.

    Raises:
        AssertionError: the format does not do what the contract says.

    Example:
        >>> import bigq
        >>> from bigq.testing import check_format
        >>> check_format(bigq.NF4(block_size=32))
        >>> check_format(bigq.NF4(), weight_error=0.01)
        Traceback (most recent call last):
        AssertionError: [8, 64]: the decoded weight is off by 0.092 of its norm; allowed is 0.01
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    _check_description(weight_format)
    for shape in shapes:
        weight = random(*shape)
        state = weight_format.quantize(weight)
        _check_state(weight_format, shape, weight, state)
        _check_decoding(weight_format, shape, weight, state, weight_error)
        if weight.numel():
            _check_rows(weight_format, weight, state)
            _check_non_finite(weight_format, weight)
        for method in weight_format.methods[1:]:
            _check_method(weight_format, method, weight, state, random(weight.shape[-1] if shape else 1).exp())
        if weight.ndim > 1 and weight.numel():
            _check_parts(weight_format, weight, state)
        if weight.ndim == 2 and weight.numel():
            for dtype in _DTYPES:
                x, bias = random(5, shape[1]).to(dtype), random(shape[0])
                _check_product(weight_format, shape, state, x, bias, activation_error)


def _check_description(weight_format: Format) -> None:
    assert is_dataclass(weight_format), f"{type(weight_format).__name__} is no dataclass"
    assert hash(weight_format) == hash(type(weight_format)(**_settings(weight_format))), "it is not frozen"
    described = weight_format.describe()
    expected = {"format": weight_format.name, **_settings(weight_format)}
    assert described == expected, f"describe() is {described}; expected {expected}"
    assert json.loads(json.dumps(described)) == described, f"describe() is no JSON: {described}"
    if weight_format.name in FORMATS:
        again = make_format(weight_format.name, **_settings(weight_format))
        assert again == weight_format, f"make_format makes {again} of the description of {weight_format}"


def _settings(weight_format: Format) -> dict[str, object]:
    return {field.name: getattr(weight_format, field.name) for field in fields(weight_format)}  # type: ignore[arg-type]


def _check_state(weight_format: Format, shape: tuple[int, ...], weight: Tensor, state: State) -> None:
    at = f"{list(shape)}:"
    found = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in state.items()}
    expected = {part: (spec.shape, spec.dtype) for part, spec in weight_format.state_spec(shape).items()}
    assert found == expected, f"{at} the state is {found}; state_spec says {expected}"
    assert "packed" in state, f"{at} no part is called 'packed'"
    floating = [part for part, tensor in state.items() if tensor.is_floating_point()]
    assert not floating, f"{at} {floating} are floating point, and a cast of the model would change them"
    elsewhere = [part for part, tensor in state.items() if tensor.device != weight.device]
    assert not elsewhere, f"{at} {elsewhere} are not on {weight.device}"
    storages = [tensor.untyped_storage() for tensor in state.values() if tensor.numel()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages), f"{at} two parts share a storage"


def _check_decoding(
    weight_format: Format, shape: tuple[int, ...], weight: Tensor, state: State, weight_error: float
) -> None:
    at = f"{list(shape)}:"
    decoded = weight_format.dequantize(state, shape, torch.float32)
    assert decoded.shape == weight.shape, f"{at} the decoded weight has the shape {list(decoded.shape)}"
    if weight.numel():
        error = float((decoded - weight).norm() / weight.norm())
        said = f"{at} the decoded weight is off by {error:.2g} of its norm; allowed is {weight_error}"
        assert error <= weight_error, said
    for dtype in _DTYPES:
        low = weight_format.dequantize(state, shape, dtype)
        assert low.dtype == dtype, f"{at} asked for {dtype}, decoded to {low.dtype}"
        assert torch.equal(low, decoded.to(dtype)), f"{at} decoding to {dtype} is not decoding once and rounding once"
    zeros = torch.zeros_like(weight)
    assert not weight_format.dequantize(weight_format.quantize(zeros), shape, torch.float32).any(), (
        f"{at} a weight of zeros does not decode to zeros"
    )


def _check_method(weight_format: Format, method: str, weight: Tensor, state: State, importance: Tensor) -> None:
    """That a method stores what "absmax" stores, and is not worse where the importance of the columns counts."""
    shape = tuple(weight.shape)
    found = weight_format.quantize(weight, method=method, importance=importance)
    _check_state(weight_format, shape, weight, found)
    error, absmax = (
        (importance * (weight_format.dequantize(some, shape, torch.float32) - weight).square()).sum()
        for some in (found, state)
    )
    # With double quantization the rounding of scales depends on their mean. A single number is exact with absmax alone.
    allowed = 1.02 * absmax + 1e-10 * (importance * weight.square()).sum()
    assert error <= allowed, f"{list(shape)}: {method!r} has an error of {error:.3g}, and 'absmax' of {absmax:.3g}"


def _check_rows(weight_format: Format, weight: Tensor, state: State) -> None:
    """That the rows of two weights give what each gives alone, as far as rows are quantized by themselves."""
    at, shape = f"{list(weight.shape)}:", tuple(weight.shape)
    rows = weight.reshape(matrix_shape(shape))
    rows = F.pad(rows, (0, 0, 0, -len(rows) % weight_format.row_group))
    measured = weight_format.measure(rows) if weight_format.measures else None
    both = torch.cat([torch.flip(rows, (0, 1)) * 3, rows])
    alone, together = (weight_format.quantize_rows(some, measured=measured).tensors for some in (rows, both))
    for part, tensor in alone.items():
        if len(together[part]) == 2 * len(tensor):  # a part that is one for a whole weight comes from `measured`
            assert torch.equal(together[part][len(tensor) :], tensor), f"{at} {part!r} of a row depends on other rows"
    again = weight_format.quantize(weight)
    assert all(torch.equal(again[part], tensor) for part, tensor in state.items()), f"{at} quantizing is not repeatable"


def _check_non_finite(weight_format: Format, weight: Tensor) -> None:
    at = f"{list(weight.shape)}:"
    for bad in (float("nan"), float("inf"), -float("inf")):
        rows = weight.reshape(matrix_shape(tuple(weight.shape))).clone()
        rows[-1, -1] = bad
        rows = F.pad(rows, (0, 0, 0, -len(rows) % weight_format.row_group))
        measured = weight_format.measure(rows) if weight_format.measures else None
        largest = weight_format.quantize_rows(rows, measured=measured).largest
        assert not largest.isfinite(), f"{at} the weight holds {bad}, and the largest scale is {float(largest)}"


def _check_parts(weight_format: Format, weight: Tensor, state: State) -> None:
    at, shape = f"{list(weight.shape)}:", tuple(weight.shape)
    whole = weight_format.dequantize(state, shape, torch.float32)
    index = torch.tensor([0, len(weight) - 1, 0], device=weight.device)
    cases: list[tuple[str, tuple[Format, dict[str, Tensor]], Tensor]] = [
        ("select(1:)", weight_format.select(state, shape, slice(1, len(weight))), whole[1:]),
        ("take_rows", weight_format.take_rows(state, index), whole[index]),
    ]
    if weight.ndim > 2:
        cases.append(("select(0)", weight_format.select(state, shape, 0), whole[0]))
    part_format, all_rows = weight_format.select(state, shape, slice(None))
    group, columns = part_format.column_group or shape[-1], shape[-1]
    for start in range(0, columns, -(-columns // 2 // group) * group or columns):
        stop = min(start + group, columns)
        part = part_format.select_columns(all_rows, start, stop) if part_format.column_group else all_rows
        cases.append((f"select_columns({start}, {stop})", (part_format, part), whole[..., start:stop]))
    for name, (part_format, part), expected in cases:
        decoded = part_format.dequantize(part, tuple(expected.shape), torch.float32)
        assert torch.equal(decoded, expected), f"{at} {name} does not decode to that part of the weight"


def _check_product(
    weight_format: Format, shape: tuple[int, ...], state: State, x: Tensor, bias: Tensor, activation_error: float
) -> None:
    dense = weight_format.dequantize(state, shape, torch.float32)
    exact = x.double() @ dense.double().T + bias.double()
    baseline = x @ dense.to(x.dtype).T + bias.to(x.dtype)
    try:
        out = weight_format.linear(x, state, bias)
        assert_within_budget(out, exact, baseline, also=activation_error)
    except AssertionError as error:
        raise AssertionError(f"{list(shape)}: a product in {x.dtype}: {error}") from None
