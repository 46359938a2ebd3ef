"""The specification itself, against values worked out by hand."""

import pytest
import torch

from bigq.ops import code_tables, reference

NAN, INF = float("nan"), float("inf")


def codes(packed):
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).tolist()


def test_nf4_by_hand():
    weight = torch.tensor([[2.0, -2.0, 0.0, 1.0]])
    packed, absmax = reference.quantize_4bit(weight, "nf4", 32)
    assert absmax.tolist() == [[2.0]]
    assert packed.tolist() == [[0xF0, 0x7C]]  # 1 -> 15, -1 -> 0, 0 -> 7, 0.5 -> 12 (0.4407; 0.5 < 0.5017)
    out = reference.dequantize_4bit(packed, absmax, "nf4", 32, 4, torch.float32)
    assert out.tolist() == [[2.0, -2.0, 0.0, 2 * torch.tensor(0.44070982933044434).item()]]


def test_fp4_by_hand():
    weight = torch.tensor([[6.0, -6.0, 0.0, 3.0, -4.0, 0.01, -0.01, -0.0]])
    packed, _ = reference.quantize_4bit(weight, "fp4", 32)
    assert codes(packed) == [[3, 11, 0, 5, 10, 0, 8, 0]]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_code_decodes_to_its_value(quant_type):
    packed = torch.arange(256, dtype=torch.uint8)[None]
    out = reference.dequantize_4bit(packed, torch.full((1, 16), 3.0), quant_type, 32, 512, torch.float32)
    table = torch.tensor(reference.CODES[quant_type])
    byte = torch.arange(256)
    assert torch.equal(out.view(256, 2), torch.stack([table[byte >> 4], table[byte & 15]], dim=1) * 3)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_code_value_encodes_to_itself(quant_type):
    table = torch.tensor(reference.CODES[quant_type])
    packed, absmax = reference.quantize_4bit(table[None], quant_type, 32)
    assert absmax.item() == 1.0
    expected = list(range(16))
    if quant_type == "fp4":
        expected[8] = 0  # the second zero
    assert codes(packed) == [expected]


@pytest.mark.parametrize("boundary", code_tables.NF4_BOUNDARIES)
def test_nf4_ties_go_to_the_lower_code(boundary):
    at = torch.tensor(boundary)
    around = torch.stack([torch.tensor(1.0), at, torch.nextafter(at, torch.tensor(2.0))])
    packed, _ = reference.quantize_4bit(around[None], "nf4", 32)
    _, tie, above, _ = codes(packed)[0]
    assert tie == code_tables.NF4_BOUNDARIES.index(boundary)
    assert above == tie + 1


@pytest.mark.parametrize("boundary", code_tables.FP4_MAGNITUDE_BOUNDARIES)
def test_fp4_ties_go_to_the_smaller_magnitude_on_both_sides(boundary):
    at = torch.tensor(boundary)
    above = torch.nextafter(at, torch.tensor(2.0))
    packed, _ = reference.quantize_4bit(torch.stack([torch.tensor(1.0), at, above, -at, -above])[None], "fp4", 32)
    _, tie, up, minus_tie, minus_up, _ = codes(packed)[0]
    rank = code_tables.FP4_MAGNITUDE_BOUNDARIES.index(boundary)
    assert (tie, minus_tie) == (code_tables.FP4_MAGNITUDE_ORDER[rank], code_tables.FP4_MAGNITUDE_ORDER[rank] + 8)
    assert (up, minus_up) == (code_tables.FP4_MAGNITUDE_ORDER[rank + 1], code_tables.FP4_MAGNITUDE_ORDER[rank + 1] + 8)


@pytest.mark.parametrize("columns", [1, 2, 31, 33, 63, 65, 100])
def test_blocks_never_straddle_rows(columns):
    weight = torch.randn(5, columns)
    packed, absmax = reference.quantize_4bit(weight, "nf4", 32)
    assert packed.shape == (5, (columns + 1) // 2)
    assert absmax.shape == (5, -(-columns // 32))
    for row in range(5):
        alone, alone_absmax = reference.quantize_4bit(weight[row : row + 1], "nf4", 32)
        assert torch.equal(packed[row], alone[0])
        assert torch.equal(absmax[row], alone_absmax[0])
        for block, scale in enumerate(absmax[row]):
            assert scale == weight[row, block * 32 : (block + 1) * 32].abs().max()
    if columns % 2:
        assert ((packed[:, -1] & 15) == 7).all()  # padded with the code of 0.0


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_empty(shape):
    packed, absmax = reference.quantize_4bit(torch.zeros(shape), "nf4", 64)
    out = reference.dequantize_4bit(packed, absmax, "nf4", 64, shape[1], torch.float16)
    assert (out.shape, out.dtype) == (shape, torch.float16)
    codes8, absmax8 = reference.quantize_int8(torch.zeros(shape))
    assert reference.dequantize_int8(codes8, absmax8, torch.float16).shape == shape
    assert reference.linear_int8(torch.zeros(2, shape[1]), codes8, absmax8, None, 6.0).shape == (2, shape[0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_block_with_nan_or_inf_has_infinite_absmax_and_its_neighbours_do_not(bad):
    weight = torch.randn(2, 128)
    weight[1, 70] = bad
    _, absmax = reference.quantize_4bit(weight, "nf4", 64)
    assert absmax.isinf().tolist() == [[False, False], [False, True]]
    _, absmax8 = reference.quantize_int8(weight)
    assert absmax8.isinf().tolist() == [[False], [True]]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_blocks_decode_to_zero_also_with_double_quant(quant_type):
    weight = torch.randn(4, 128)
    weight[2, 64:] = 0
    packed, absmax = reference.quantize_4bit(weight, quant_type, 64)
    nested = reference.dequantize_absmax(*reference.quantize_absmax(absmax))
    assert nested[2, 1] != 0  # the scale itself does not come back as zero
    out = reference.dequantize_4bit(packed, nested, quant_type, 64, 128, torch.float32)
    assert torch.equal(out[2, 64:], torch.zeros(64))


def test_double_quant_is_the_nearest_code_and_ties_to_even():
    absmax = torch.rand(3, 200) + 0.5
    codes8, nested, offset = reference.quantize_absmax(absmax)
    assert nested.shape == (3,)
    assert offset == absmax.flatten().mean()
    code = reference.nested_code(torch.device("cpu"))
    centred = (absmax - offset).flatten()
    for block in range(3):
        part = slice(256 * block, 256 * (block + 1))
        scaled = centred[part] * (1 / nested[block])
        distance = (scaled[:, None].double() - code[None].double()).abs()
        chosen = distance.gather(1, codes8.flatten()[part].long()[:, None])[:, 0]
        assert (chosen - distance.min(dim=1).values).max() < 1e-8
    back = reference.dequantize_absmax(codes8, nested, offset)
    assert ((back - absmax).abs() <= 0.0071 * nested.max()).all()  # half of the widest gap between two codes


def test_int8_rounds_half_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.4]])
    packed, absmax = reference.quantize_int8(weight)
    assert packed.tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    assert absmax.tolist() == [[127.0]]


def test_int8_beyond_half_precision():
    weight = torch.tensor([[1e5, -5e4, 0.0]])
    packed, absmax = reference.quantize_int8(weight)
    assert packed.tolist() == [[127, -64, 0]]
    assert reference.dequantize_int8(packed, absmax, torch.float32)[0, 0] == pytest.approx(1e5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("columns", [64, 77])
def test_the_bits_of_scales_give_the_same_as_their_floats(quant_type, columns):
    def bits(tensor):
        return tensor.view(torch.int32)

    weight, x, bias = torch.randn(12, columns), torch.randn(3, columns), torch.randn(12)
    packed, absmax = reference.quantize_4bit(weight, quant_type, 32)
    stored = reference.quantize_absmax(absmax)
    codes8, nested, offset = stored
    for actual, expected in zip(reference.quantize_absmax(bits(absmax)), stored, strict=True):
        assert torch.equal(actual, expected)
    expected = reference.dequantize_absmax(codes8, nested, offset)
    assert torch.equal(reference.dequantize_absmax(codes8, bits(nested), bits(offset)), expected)
    rest = (quant_type, 32, columns, torch.bfloat16)
    expected = reference.dequantize_4bit(packed, absmax, *rest)
    assert torch.equal(reference.dequantize_4bit(packed, bits(absmax), *rest), expected)
    for floats, ints in (
        ((absmax, bias, None, None), (bits(absmax), bias, None, None)),
        ((codes8, None, nested, offset), (codes8, None, bits(nested), bits(offset))),
    ):
        expected = reference.linear_4bit(x, packed, *floats, quant_type, 32, columns)
        assert torch.equal(reference.linear_4bit(x, packed, *ints, quant_type, 32, columns), expected)


def test_the_bits_of_int8_scales_give_the_same_as_their_floats():
    weight, x = torch.randn(12, 77), torch.randn(3, 77)
    packed, absmax = reference.quantize_int8(weight)
    bits = absmax.view(torch.int32)
    expected = reference.dequantize_int8(packed, absmax, torch.bfloat16)
    assert torch.equal(reference.dequantize_int8(packed, bits, torch.bfloat16), expected)
    for threshold in (0.0, 1.5):
        expected = reference.linear_int8(x, packed, absmax, None, threshold)
        assert torch.equal(reference.linear_int8(x, packed, bits, None, threshold), expected)


class TestLinearInt8:
    """threshold semantics, on integers so that every product is exact."""

    weight = torch.tensor([[127, -3, 5, 64], [1, 2, 3, 127]], dtype=torch.int8)
    absmax = torch.tensor([[127.0], [127.0]])

    def test_without_outliers_it_is_the_integer_product(self):
        x = torch.tensor([[127.0, 1.0, -2.0, 3.0]])
        out = reference.linear_int8(x, self.weight, self.absmax, torch.tensor([0.5, -0.5]), 0.0)
        assert out[0].tolist() == pytest.approx([127 * 127 - 3 - 10 + 192 + 0.5, 127 + 2 - 6 + 381 - 0.5])

    def test_an_outlier_takes_its_whole_column_and_leaves_the_row_scale(self):
        # |x| >= 100 only in column 0 of row 0; row 1's 20 in that column is no outlier but counts for the row's scale.
        x = torch.tensor([[100.0, 10.0, -4.0, 1.0], [20.0, 10.0, 3.0, -7.0]])
        out = reference.linear_int8(x, self.weight, self.absmax, None, 100.0)
        dense = self.weight.float()
        for row, scale in ((0, 10.0), (1, 20.0)):
            codes8 = (x[row, 1:] * (127 / scale)).round()
            expected = (codes8 @ dense[:, 1:].T) * scale / 127 + x[row, 0] * dense[:, 0]
            assert out[row].tolist() == pytest.approx(expected.tolist(), rel=1e-6)

    def test_threshold_is_inclusive(self):
        x = torch.tensor([[6.0, 1.0, 1.0, 1.0]])
        with_outlier = reference.linear_int8(x, self.weight, self.absmax, None, 6.0)
        exact = x @ self.weight.float().T
        assert with_outlier[0].tolist() == pytest.approx(exact[0].tolist(), rel=1e-6)

    @pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)], ids=str)
    def test_shapes(self, shape):
        x = torch.randn(shape)
        out = reference.linear_int8(x, self.weight, self.absmax, None, 6.0)
        assert out.shape == (*shape[:-1], 2)

    def test_deep_products_are_exact(self):
        x = torch.full((1, 5000), 127.0)
        weight = torch.full((1, 5000), 127, dtype=torch.int8)
        out = reference.linear_int8(x, weight, torch.tensor([[127.0]]), None, 0.0)
        assert out.item() == pytest.approx(5000 * 127 * 127, rel=1e-6)
