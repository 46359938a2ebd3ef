"""The formats against bitsandbytes, run on the CPU: the same bytes where both encode by one rule, bounds where not."""

import hashlib
import warnings
from types import ModuleType

import pytest
import torch
from torch import nn

import bigq
from bigq.formats import BLOCK_SIZES
from bigq.ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it is not silent on every CPU
        return pytest.importorskip("bitsandbytes")


def weights(kind: str, rows: int, columns: int) -> torch.Tensor:
    """Float32 weights: bell-shaped as a trained layer's, with rare large ones, or near the bottom of float16."""
    if kind == "normal":
        return torch.randn(rows, columns) * 0.02
    if kind == "heavy-tailed":
        uniform, normal = torch.rand(rows, columns), torch.randn(rows, columns)
        return (normal / uniform.clamp_min(1e-4)).clamp(-1e4, 1e4)  # P(|w| > t) falls as 1/t
    return torch.randn(rows, columns) * 1e-6


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())).hexdigest()[:24]


def golden_weight() -> torch.Tensor:
    """65,536 values from integer arithmetic, so that no random generator is part of the vectors."""
    i = torch.arange(65536, dtype=torch.int64)
    noise = ((i * 2654435761) % 2**32 // 65536 - 32768).float() / 32768
    return (noise * (1 + (i // 64).float() / 1024)).view(16, 4096)


# bitsandbytes' own digests of the packed bytes, the scales and the dequantized values; the FP4 bytes alone are ours,
# because bitsandbytes encodes FP4 by one rule on CUDA, which is the one here, and by another on the CPU.
@pytest.mark.parametrize(
    "quant_type, block_size, dtype, packed, absmax, dequantized",
    [
        ("nf4", 32, "float32", "6950e3f4190db34d748e645b", "1e9af0a3fb2a91457680c4db", "0ec0a5aff37920a81f2cf91c"),
        ("nf4", 64, "float32", "1ac866745b58c5235988d9f0", "561a33d019153b2cd6afe85b", "e0dea35830c649cc1da27dce"),
        ("nf4", 128, "float32", "47e108746a3ff73c9252cbbb", "f5385345663790fb9b4d29d2", "9a2ddb902f47ad847f558cec"),
        ("nf4", 4096, "float32", "84f8098ae6b903df3c77d623", "fbf2501f7ab2ad3f2ccfe11b", "3c1a54c693ae123f3bd7d94a"),
        ("nf4", 64, "float16", "a49e52ed1e3d675fcb53d32b", "55efe052de6703be51f096d2", "44da5426fa12f073a415a400"),
        ("nf4", 64, "bfloat16", "d862baf2726f8cb6b5c2c20b", "4b5cefff26e79e617341cda2", "60becadb161f6540a2c74f3e"),
        ("fp4", 64, "float32", "2fc6aa43be623056d469e6ce", "561a33d019153b2cd6afe85b", "9593bbefaf27c0f8f9be1fb8"),
    ],
)
def test_golden_vectors(quant_type, block_size, dtype, packed, absmax, dequantized):
    weight = golden_weight().to(getattr(torch, dtype))
    codes, scales = reference.quantize_4bit(weight, quant_type, block_size)
    dense = reference.dequantize_4bit(codes, scales, quant_type, block_size, 4096, weight.dtype)
    assert (sha256(codes), sha256(scales), sha256(dense)) == (packed, absmax, dequantized)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "tiny"])
def test_nf4_is_byte_equal(bnb, kind, dtype):
    weight = weights(kind, 6, 4096).to(dtype)
    for block_size in BLOCK_SIZES:
        packed, absmax = reference.quantize_4bit(weight, "nf4", block_size)
        theirs, state = bnb.functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        assert torch.equal(packed.flatten(), theirs.flatten()), block_size
        assert torch.equal(absmax.flatten(), state.absmax), block_size
        dense = reference.dequantize_4bit(packed, absmax, "nf4", block_size, 4096, dtype)
        assert torch.equal(dense, bnb.functional.dequantize_4bit(theirs, state)), block_size


@pytest.mark.parametrize("columns", [1, 77, 96, 288])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_partial_block_is_a_row_of_theirs(bnb, dtype, columns):
    # Their blocks run on into the next row and ours end with theirs: one row at a time they are the same.
    weight = weights("normal", 24, columns).to(dtype)
    packed, absmax = reference.quantize_4bit(weight, "nf4", 64)
    for row in range(24):
        theirs, state = bnb.functional.quantize_4bit(weight[row], blocksize=64, quant_type="nf4")
        assert torch.equal(packed[row], theirs.flatten())
        assert torch.equal(absmax[row], state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_byte_decodes_equally(bnb, quant_type, dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(4).view(4, 256)
    absmax = torch.rand(4, 512 // 64) * 3
    ours = reference.dequantize_4bit(packed, absmax, quant_type, 64, 512, dtype)
    state = bnb.functional.QuantState(
        absmax=absmax.flatten(), shape=torch.Size([4, 512]), blocksize=64, quant_type=quant_type, dtype=dtype
    )
    assert torch.equal(ours, bnb.functional.dequantize_4bit(packed.view(-1, 1), state))


FP4_MIDPOINTS = torch.tensor([1 / 384, 11 / 128, 5 / 24, 7 / 24, 5 / 12, 7 / 12, 5 / 6], dtype=torch.float64)


# Of the 1,048,576 weights here 1 decodes differently from float32, 53 from float16 and 575 from bfloat16, whose few
# significant bits make quotients such as 1/4 + 1/24 frequent.
@pytest.mark.parametrize(
    "dtype, allowed",
    [
        pytest.param(torch.float32, 10, id="float32"),
        pytest.param(torch.float16, 100, id="float16"),
        pytest.param(torch.bfloat16, 1000, id="bfloat16"),
    ],
)
def test_fp4_differs_only_at_a_boundary(bnb, dtype, allowed):
    weight = weights("normal", 256, 4096).to(dtype)
    packed, absmax = reference.quantize_4bit(weight, "fp4", 64)
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    assert torch.equal(absmax.flatten(), state.absmax)
    theirs = theirs.view(packed.shape)

    one = torch.ones_like(absmax)
    value, their_value = (
        reference.dequantize_4bit(p, one, "fp4", 64, 4096, torch.float32).double() for p in (packed, theirs)
    )
    differs = value != their_value
    assert differs.sum() <= allowed
    # The rules break ties to different sides, and the CUDA constants are at most 14 float32 steps off the midpoints:
    # where the two disagree, the scaled weight is that close to a midpoint and neither value better than the other.
    scaled = (weight.double() / absmax.double().repeat_interleave(64, dim=1))[differs].abs()
    nearest = (scaled[:, None] - FP4_MIDPOINTS).abs().amin(dim=1)
    assert (nearest <= 16 * scaled * torch.finfo(torch.float32).eps).all()
    # The other codes that differ are the two zeros.
    for ours_nibble, theirs_nibble in [(packed >> 4, theirs >> 4), (packed & 15, theirs & 15)]:
        same_value = (ours_nibble != theirs_nibble) & ((ours_nibble | theirs_nibble) & 7 == 0)
        assert ((ours_nibble != theirs_nibble) ^ same_value).sum() <= differs.sum()


def exact_nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Index of the entry of `nested_code` nearest to each float64 value, by comparison with all 256."""
    return torch.cat([(part[:, None] - NESTED_CODE).abs().argmin(dim=1) for part in scaled.split(1 << 14)])


NESTED_CODE = reference.nested_code(CPU).double()


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "tiny"])
def test_double_quant(bnb, kind):
    weight = weights(kind, 500, 4096)  # 32,000 scales: 125 blocks of 256
    _, absmax = reference.quantize_4bit(weight, "nf4", 64)
    codes, nested_absmax, offset = reference.quantize_absmax(absmax)
    _, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(state.state2.code, reference.nested_code(CPU))
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(offset, state.offset.reshape(1))

    scaled = (absmax.flatten() - offset).double() / nested_absmax.double().repeat_interleave(256)
    ours, theirs = codes.flatten().long(), state.absmax.long()
    assert torch.equal(ours, exact_nearest(scaled))
    assert (ours != theirs).float().mean() < 0.01  # their CPU encoder looks up a table of 65,536 buckets
    distance, their_distance = ((scaled - NESTED_CODE[index]).abs() for index in (ours, theirs))
    assert (distance <= their_distance).all()


def test_double_quant_partial_last_block(bnb):
    weight = weights("normal", 7, 4096)  # 448 scales: a block of 256 and one of 192
    _, absmax = reference.quantize_4bit(weight, "nf4", 64)
    _, nested_absmax, offset = reference.quantize_absmax(absmax)
    _, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(offset, state.offset.reshape(1))


def test_double_quant_decodes_equally(bnb):
    codes = torch.arange(256, dtype=torch.uint8).repeat(3).view(12, 64)
    nested_absmax, offset = torch.tensor([0.5, 3.0, 1e-3]), torch.tensor([0.7])
    state = bnb.functional.QuantState(
        absmax=nested_absmax, code=reference.nested_code(CPU), blocksize=256, dtype=torch.float32
    )
    theirs = bnb.functional.dequantize_blockwise(codes, state) + offset
    assert torch.equal(reference.dequantize_absmax(codes, nested_absmax, offset), theirs)


@pytest.mark.parametrize("double_quant", [False, True], ids=["absmax", "double-quant"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_blocks_decode_to_zero(quant_type, double_quant):
    weight = weights("normal", 16, 256)
    weight[3] = 0.0
    weight[5, 64:128] = 0.0
    config = bigq.QuantizationConfig(quant_type, double_quant=double_quant)
    dense = bigq.dequantize_tensor(bigq.quantize_tensor(weight, config))
    assert not dense[3].any()
    assert not dense[5, 64:128].any()
    assert dense[5, :64].any()


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "tiny"])
def test_int8_is_byte_equal(bnb, kind):
    weight = weights(kind, 100, 1000).half()
    weight[7] = 0.0
    codes, absmax = reference.quantize_int8(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0 / 0 in their zero row
        theirs, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax.flatten(), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e6, 1e-9], ids=["above-float16", "below-float16"])
def test_int8_beyond_the_range_of_float16(bnb, scale, dtype):
    weight = (torch.randn(8, 256) * scale).to(dtype)
    codes, absmax = reference.quantize_int8(weight)
    exact = weight.double() / (absmax.double() / 127)
    assert torch.equal(absmax, weight.float().abs().amax(dim=1, keepdim=True))
    assert (codes.double() - exact).abs().max() <= 0.5 + 1e-5
    theirs = bnb.functional.int8_vectorwise_quant(weight.half())[0]
    assert not theirs.any()


def outliers(x, threshold):
    """(the elements that are not quantized, the columns that hold one)"""
    outlier = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    return outlier, outlier.any(dim=0)


def exact_llm_int8(x, codes, absmax, bias, threshold, row_scale):
    """LLM.int8() in float64 with a given scale for each row of x, and the sum of the magnitudes of its terms."""
    _, column = outliers(x, threshold)
    x, codes, scale = x.double(), codes.double(), absmax.double()
    quantized = (x.masked_fill(column, 0.0) * 127 / row_scale).round()
    regular = (quantized @ codes.T) * row_scale * scale.T / 127**2
    dense, out_x = codes * scale / 127, x.masked_fill(~column, 0.0)
    exact = regular + out_x @ dense.T + bias.double()
    return exact, regular.abs() + out_x.abs() @ dense.T.abs() + bias.double().abs()


def their_linear(bnb, weight, bias, threshold):
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.to("cpu").eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_linear_int8(bnb, threshold, tokens, dtype):
    weight, bias = weights("normal", 48, 256).half(), (torch.randn(48) * 0.1).to(dtype)
    # bitsandbytes casts activations to float16 first, so only values that it leaves alone can be compared.
    x = torch.randn(tokens, 256).bfloat16().to(dtype)
    x[0, 3], x[-1, 100], x[tokens // 2, 200] = 40.0, -6.0, 9.5  # outliers, one exactly at the threshold
    if tokens > 1:
        x[-1, 3] = 5.75  # the largest regular value of its row, in a column that is an outlier because of another row
    outlier, column = outliers(x, threshold)
    # bitsandbytes' reading of the paper: what is below the threshold counts in the scale of its row, also in such a
    # column. Quotients that float32 and float64 may round apart are removed.
    row_scale = x.masked_fill(outlier, 0.0).abs().amax(dim=1, keepdim=True).double()
    x[((x.double() * 127 / row_scale).abs().remainder(1) - 0.5).abs() < 1e-3] = 0.0
    codes, absmax = reference.quantize_int8(weight)

    exact, magnitude = exact_llm_int8(x, codes, absmax, bias, threshold, row_scale)
    # The products with outliers are rounded to dtype three times (weight, product, sum), the rest once or twice: in all
    # less than four half steps of each term.
    budget = 2 * torch.finfo(dtype).eps * magnitude
    ours = reference.linear_int8(x, codes, absmax, bias, threshold)
    assert ours.dtype == dtype
    assert ((ours.double() - exact).abs() <= budget).all()
    with torch.no_grad():
        theirs = their_linear(bnb, weight, bias, threshold)(x)
    their_budget = budget + 2e-5 * magnitude  # they round 1/127**2 to 6.200124e-05
    assert ((theirs.double() - exact).abs() <= their_budget).all()
    assert ((theirs.double() - ours.double()).abs() <= budget + their_budget).all()

    if threshold and tokens > 1 and dtype != torch.bfloat16:  # the other reading is far outside the budget
        smaller = x.masked_fill(column, 0.0).abs().amax(dim=1, keepdim=True).double()
        other, _ = exact_llm_int8(x, codes, absmax, bias, threshold, smaller)
        assert (other - exact)[-1].abs().mean() > 2 * budget[-1].mean()
