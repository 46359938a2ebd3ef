"""Weights in FP8, int8 and MXFP4 with scales have the numbers of their codes, whole, in windows and moved."""

import os
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from bigq import CheckpointError
from bigq.checkpoint import Checkpoint, Conversion, Converted, Rows, RowWindows, read_tensor, with_scaled
from bigq.checkpoint.scaled_rows import ScaledRows, Scales
from scaled_checkpoints import e2m1_numbers, in_fp8, numbers, powers, write

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"group_size": 32}}}}
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def opened(folder):
    return with_scaled(Checkpoint.open(folder), folder)


def read_all(source):
    """Every tensor, by its spans and by `read`, which have to agree."""
    found = dict(source.read(list(source.tensors)))
    for name, tensor in found.items():
        stored = source.tensors[name]
        assert (stored.shape, stored.dtype) == (tensor.shape, tensor.dtype), name
        if stored.spans:
            assert torch.equal(read_tensor(stored).nan_to_num(9), tensor.nan_to_num(9)), name
    return {name: tensor.clone() for name, tensor in found.items()}


# shape of a weight, block, shape in which its scales are stored
LAYOUTS = {
    "blocks": ((256, 384), (128, 128), None),
    "blocks, the last ones smaller": ((200, 300), (128, 128), None),
    "rows": ((70, 96), (1, 96), None),
    "rows, flat": ((70, 96), (1, 96), (70,)),
    "one": ((70, 96), (70, 96), ()),
    "one, in a list": ((70, 96), (70, 96), (1,)),
    "groups of columns": ((70, 96), (1, 32), None),
    "a stack in blocks": ((3, 256, 128), (128, 128), None),
    "a stack in blocks, the last ones smaller": ((3, 200, 300), (128, 128), None),
    "a stack, by rows": ((3, 70, 96), (1, 96), None),
    "a stack, one each": ((3, 70, 96), (70, 96), (3,)),
}


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_has_the_numbers_of_its_codes(tmp_path, layout, end):
    shape, block, stored_as = LAYOUTS[layout]
    said = GROUPS if layout == "groups of columns" else FP8
    codes, scales = in_fp8(torch.randn(shape), block)
    expected = numbers(codes, scales, block)
    scales = scales if stored_as is None else scales.reshape(stored_as)
    write(tmp_path, {"a.weight": codes, f"a.weight{end}": scales, "a.bias": torch.ones(3, dtype=BF16)}, said)
    found = read_all(opened(tmp_path))
    assert found.keys() == {"a.weight", "a.bias"}
    assert found["a.weight"].dtype == BF16
    assert torch.equal(found["a.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_other_kinds_of_fp8(tmp_path, dtype):
    codes, scales = in_fp8(torch.randn(70, 96), (1, 96), dtype)
    write(tmp_path, {"w": codes, "w_scale": scales.to(BF16)}, {"quant_method": "fbgemm_fp8"})
    assert torch.equal(read_all(opened(tmp_path))["w"], numbers(codes, scales.to(BF16), (1, 96)))


@pytest.mark.parametrize("said", ["bfloat16", "float16", "float32", "torch.float16", "float8_e4m3fn", None, 3], ids=str)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_numbers_have_the_dtype_of_the_config(tmp_path, said, key):
    codes, scales = in_fp8(torch.randn(128, 128), (128, 128))
    write(tmp_path, {"w": codes, "w_scale_inv": scales}, FP8, **{key: said})
    expected = {"float16": torch.float16, "torch.float16": torch.float16, "float32": torch.float32}.get(said, BF16)
    found = read_all(opened(tmp_path))["w"]
    assert found.dtype == expected
    assert torch.equal(found, numbers(codes, scales, (128, 128), expected))


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"text_config": {"dtype": "float16"}}, torch.float16),
        ({"text_config": {"torch_dtype": "float16"}, "vision_config": {"dtype": None}}, torch.float16),
        ({"text_config": {"dtype": "float16"}, "vision_config": {"dtype": "float32"}}, BF16),
        ({"text_config": {"dtype": "float16"}, "dtype": "float32"}, torch.float32),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
    ],
    ids=["nested", "nested, by the old name", "two nested ones", "the outer one first", "the old name beside null"],
)
def test_the_dtype_of_a_config_may_be_that_of_its_parts(tmp_path, config, expected):
    codes, scales = in_fp8(torch.randn(128, 128), (128, 128))
    write(tmp_path, {"w": codes, "w_scale_inv": scales}, FP8, **config)
    assert opened(tmp_path).tensors["w"].dtype == expected


@pytest.mark.parametrize(
    "others, expected",
    [
        ([torch.float16], torch.float16),
        ([torch.float32, torch.float32], torch.float32),
        ([torch.float32, BF16], BF16),
        ([torch.float64], BF16),
        ([torch.int64], BF16),
    ],
    ids=str,
)
def test_without_a_config_numbers_have_the_dtype_of_all_other_floats(tmp_path, others, expected):
    """A norm in float16 beside a linear in bfloat16 would not run."""
    codes, scales = in_fp8(torch.randn(32, 32), (32, 32))
    tensors = {"q.weight": codes, "q.weight_scale": scales, "q.input_scale": torch.ones(1)}
    write(tmp_path, tensors | {f"{i}": torch.ones(3, dtype=dtype) for i, dtype in enumerate(others)})
    assert opened(tmp_path).tensors["q.weight"].dtype == expected
    write(tmp_path, tensors, FP8, dtype="float16")
    assert opened(tmp_path).tensors["q.weight"].dtype == torch.float16


@pytest.mark.parametrize("block", [[128, 128], "128x128"], ids=str)
def test_groups_of_activations_are_no_blocks_of_weights(tmp_path, block):
    """The scheme FP8_BLOCK of compressed-tensors, which quantizes activations in groups of 128."""
    group = {
        "weights": {"strategy": "block", "block_structure": block, "group_size": None},
        "input_activations": {"strategy": "group", "group_size": 128, "dynamic": True},
        "output_activations": {"group_size": 64},
    }
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    said["kv_cache_scheme"] = {"num_bits": 8, "group_size": 16}
    codes, scales = in_fp8(torch.randn(200, 300), (128, 128))
    write(tmp_path, {"w": codes, "w_scale": scales}, said)
    assert torch.equal(read_all(opened(tmp_path))["w"], numbers(codes, scales, (128, 128)))


def test_no_columns(tmp_path):
    write(tmp_path, {"w": torch.zeros(4, 0).to(E4M3), "w_scale": torch.ones(4, 1)}, FP8)
    assert read_all(opened(tmp_path))["w"].shape == (4, 0)


def test_scales_are_read_under_another_default_device(tmp_path, monkeypatch):
    codes, scales = in_fp8(torch.randn(70, 96), (70, 96))
    write(tmp_path, {"w": codes, "w_scale": scales}, FP8)
    stored, empty = opened(tmp_path).tensors["w"], torch.empty
    # what `with torch.device("meta")` does to it, but where tests have replaced it
    monkeypatch.setattr(torch, "empty", lambda *args, device="meta", **kwargs: empty(*args, device=device, **kwargs))
    with torch.device("meta"):
        found, whole = stored.coding.decode(codes.view(torch.uint8)), read_tensor(stored)
    assert torch.equal(found, numbers(codes, scales, (70, 96)))
    assert torch.equal(whole, found)


def test_exponents_of_two_are_scales_too(tmp_path):
    codes, exponents = torch.randn(70, 96).to(E4M3), torch.randint(100, 140, (70, 3), dtype=torch.uint8)
    write(
        tmp_path,
        {"a": codes, "a_scale_inv": exponents, "b": codes, "b_scale_inv": exponents.view(torch.float8_e8m0fnu)},
        {"quant_method": "fp8", "weight_block_size": [1, 32]},
    )
    expected = numbers(codes, powers(exponents), (1, 32))
    found = read_all(opened(tmp_path))
    assert torch.equal(found["a"], expected)
    assert torch.equal(found["b"], expected)


def test_int8_of_compressed_tensors(tmp_path):
    codes, scales = torch.randint(-127, 128, (70, 96), dtype=torch.int8), torch.rand(70, 1)
    said = {"quant_method": "compressed-tensors", "format": "int-quantized", "sparsity_config": {"format": "dense"}}
    write(tmp_path, {"w": codes, "w_scale": scales}, said)
    assert torch.equal(read_all(opened(tmp_path))["w"], numbers(codes, scales, (1, 96)))


def mxfp4(*shape):
    """Blocks and exponents of a stack as gpt-oss has them, with every code and the smallest and largest exponent."""
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // 32, 16), dtype=torch.uint8)
    exponents = torch.randint(100, 140, blocks.shape[:-1], dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 1] = torch.arange(16, dtype=torch.uint8) * 17, 0
    exponents[0, 1, 0], exponents[0, 1, -1] = 0, 254
    return blocks, exponents


def test_mxfp4_is_the_transposed_stack_of_a_model(tmp_path):
    blocks, exponents = mxfp4(3, 10, 96)
    write(tmp_path, {"e.up_blocks": blocks, "e.up_scales": exponents}, {"quant_method": "mxfp4"})
    found = read_all(opened(tmp_path))
    assert found.keys() == {"e.up"}
    assert torch.equal(found["e.up"], e2m1_numbers(blocks.flatten(-2), exponents).mT)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    mxfp4_of_transformers = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, exponents = mxfp4(3, 10, 96)
    exponents[0, 1, -1] = 130  # by its formula the largest exponent is infinite, which is no code's number
    write(tmp_path, {"e.up_blocks": blocks, "e.up_scales": exponents}, {"quant_method": "mxfp4"})
    expected = mxfp4_of_transformers.convert_moe_packed_tensors(blocks, exponents)
    assert torch.equal(read_all(opened(tmp_path))["e.up"], expected)


def test_an_exponent_of_nan_is_nan(tmp_path):
    blocks, exponents = mxfp4(1, 2, 32)
    exponents[0, 0, 0] = 255
    write(tmp_path, {"e_blocks": blocks, "e_scales": exponents})
    found = dict(opened(tmp_path).read(["e"]))["e"]
    assert found[0, :, 0].isnan().all()
    assert not found[0, :, 1].isnan().any()


def test_two_codes_in_a_byte_of_fp8s_experts(tmp_path):
    packed = torch.randint(0, 256, (70, 48), dtype=torch.uint8)
    exponents = torch.randint(100, 140, (70, 3), dtype=torch.uint8)
    write(tmp_path, {"w": packed.view(torch.int8), "w_scale_inv": exponents}, FP8)
    assert torch.equal(read_all(opened(tmp_path))["w"], e2m1_numbers(packed, exponents))


@pytest.mark.parametrize(
    "layout", ["blocks, the last ones smaller", "rows", "one", "a stack in blocks, the last ones smaller"]
)
def test_windows_of_rows(tmp_path, layout):
    shape, block, _ = LAYOUTS[layout]
    codes, scales = in_fp8(torch.randn(shape), block)
    write(tmp_path, {"w": codes, "w_scale": scales}, FP8)
    source, expected = opened(tmp_path), numbers(codes, scales, block)
    rows = shape[0]
    for start, stop in ((0, rows), (0, 1), (rows // 2, rows), (1, rows - 1), (2, 2)):
        part = RowWindows(source, {"w": Rows(start=start, stop=stop)})
        assert part.tensors["w"].nbytes == expected[start:stop].numel()
        assert torch.equal(read_all(part)["w"], expected[start:stop])
        inner = RowWindows(part, {"w": Rows(start=0, stop=(stop - start) // 2)})
        assert torch.equal(read_all(inner)["w"], expected[start:stop][: (stop - start) // 2])


def test_windows_of_a_transposed_stack(tmp_path):
    blocks, exponents = mxfp4(5, 10, 96)
    write(tmp_path, {"e_blocks": blocks, "e_scales": exponents})
    expected = e2m1_numbers(blocks.flatten(-2), exponents).mT
    part = RowWindows(opened(tmp_path), {"e": Rows(start=1, stop=4)})
    assert torch.equal(read_all(part)["e"], expected[1:4])


def converted(source, members, names, convert):
    return Converted(source, [Conversion(tuple(members), tuple(names), convert, moves_rows=True)])


def test_experts_are_stacked_where_their_bytes_are(tmp_path):
    tensors, expected = {}, {}
    for name in ("c", "a", "b"):
        codes, scales = in_fp8(torch.randn(200, 300), (128, 128))
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        expected[name] = numbers(codes, scales, (128, 128))
    write(tmp_path, tensors, FP8)
    stack = converted(opened(tmp_path), "abc", ["stack"], lambda members: [torch.stack(members)])
    assert stack.tensors["stack"].spans
    assert stack.tensors["stack"].nbytes == 3 * 200 * 300
    whole = torch.stack([expected[name] for name in "abc"])
    assert torch.equal(read_all(stack)["stack"], whole)
    window = RowWindows(stack, {"stack": Rows(start=1, stop=3)})
    assert torch.equal(read_all(window)["stack"], whole[1:3])


def test_rows_are_joined_and_divided_where_their_bytes_are(tmp_path):
    tensors, expected = {}, {}
    for name in ("gate", "up"):
        codes, scales = in_fp8(torch.randn(200, 96), (128, 32))
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        expected[name] = numbers(codes, scales, (128, 32))
    write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 32]})
    whole = torch.cat([expected["gate"], expected["up"]])
    joined = converted(opened(tmp_path), ["gate", "up"], ["both"], lambda members: [torch.cat(members)])
    assert torch.equal(read_all(joined)["both"], whole)
    split = converted(joined, ["both"], ["x", "y"], lambda members: list(members[0].split([30, 370])))
    found = read_all(split)
    assert split.tensors["y"].spans
    assert torch.equal(found["x"], whole[:30])
    assert torch.equal(found["y"], whole[30:])


@pytest.mark.parametrize("other", ["floats", "other blocks"])
def test_unlike_members_are_stacked_by_their_numbers(tmp_path, other):
    codes, scales = in_fp8(torch.randn(256, 256), (128, 128))
    tensors = {"a": codes, "a_scale_inv": scales}
    expected = [numbers(codes, scales, (128, 128))]
    if other == "floats":
        tensors["b"] = torch.randn(256, 256, dtype=BF16)
        expected.append(tensors["b"])
    else:
        codes, scales = in_fp8(torch.randn(256, 256), (1, 256))
        tensors |= {"b": codes, "b_scale_inv": scales}
        expected.append(numbers(codes, scales, (1, 256)))
    write(tmp_path, tensors, FP8)
    stack = converted(opened(tmp_path), "ab", ["stack"], lambda members: [torch.stack(members)])
    assert torch.equal(read_all(stack)["stack"], torch.stack(expected))


def test_a_transposed_stack_is_converted_by_its_numbers(tmp_path):
    blocks, exponents = mxfp4(4, 10, 96)
    write(tmp_path, {"e_blocks": blocks, "e_scales": exponents})
    halves = converted(opened(tmp_path), ["e"], ["x", "y"], lambda members: list(members[0].chunk(2)))
    found, expected = read_all(halves), e2m1_numbers(blocks.flatten(-2), exponents).mT
    assert torch.equal(found["x"], expected[:2])
    assert torch.equal(found["y"], expected[2:])


def test_pickles_of_both_formats(tmp_path):
    codes, scales = torch.randint(-127, 128, (200, 300), dtype=torch.int8), torch.rand(2, 3)
    for is_zip in (True, False):
        folder = write(tmp_path / str(is_zip), {"unused": scales}, FP8 | {"quant_method": "compressed-tensors"})
        (folder / "model.safetensors").unlink()
        state = {"w": codes, "w_scale": scales}
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        source = opened(folder)
        assert bool(source.tensors["w"].spans) == is_zip
        assert torch.equal(read_all(source)["w"], numbers(codes, scales, (128, 128)))


def test_scales_of_activations_and_caches_are_left_out(tmp_path):
    codes, scales = in_fp8(torch.randn(32, 32), (32, 32))
    one = torch.ones(1)
    tensors = {
        "q.weight": codes,
        "q.weight_scale": scales,
        "q.input_scale": one,
        "q.input_zero_point": one,
        "q.k_scale": one,
        "q.v_scale": torch.ones(2, 1, 1),
        "q.v_zero_point": torch.ones(2, 1, 1),
    }
    tensors |= {"q.bias": one, "other.input_scale": one, "q.output_scale": torch.ones(2)}
    said = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    kept = {"q.weight", "q.bias", "other.input_scale", "q.output_scale"}
    assert opened(write(tmp_path / "cache", tensors, said)).tensors.keys() == kept
    del said["kv_cache_scheme"]
    assert opened(write(tmp_path / "none", tensors, said)).tensors.keys() == kept | {
        "q.k_scale",
        "q.v_scale",
        "q.v_zero_point",
    }


@pytest.mark.parametrize("scale, activations", [("scale", "activation_scale"), ("qscale_weight", "qscale_act")])
def test_other_names_of_scales_in_fp8(tmp_path, scale, activations):
    """DeepSeek-V4 and Mistral have them, and transformers reads them in "fp8" alone."""
    codes, scales = in_fp8(torch.randn(200, 300), (128, 128))
    packed, exponents = torch.randint(0, 256, (70, 48), dtype=torch.uint8), torch.full((70, 3), 120, dtype=torch.uint8)
    tensors = {"q.weight": codes, f"q.{scale}": scales, f"q.{activations}": torch.ones(1)}
    tensors |= {"e.weight": packed.view(torch.int8), f"e.{scale}": exponents.view(torch.float8_e8m0fnu)}
    found = read_all(opened(write(tmp_path, tensors, FP8)))
    assert found.keys() == {"q.weight", "e.weight"}
    assert torch.equal(found["q.weight"], numbers(codes, scales, (128, 128)))
    assert torch.equal(found["e.weight"], e2m1_numbers(packed, exponents))
    with pytest.raises(CheckpointError, match=f"unknown kind: q.{scale} of q.weight in"):
        opened(write(tmp_path / "unsaid", {name: tensors[name] for name in ("q.weight", f"q.{scale}")}))


@pytest.mark.parametrize("stored_as", [(2, 1, 64), (2, 64, 1)], ids=str)
def test_stacks_of_fbgemm_have_a_scale_for_each_column(tmp_path, stored_as):
    """transformers holds them as [E, K, N], and scales of the N columns in either shape, also where K is N."""
    codes, scales = torch.randn(2, 64, 64).to(E4M3), torch.rand(2, 1, 64)
    write(tmp_path, {"w": codes, "w_scale": scales.reshape(stored_as)}, {"quant_method": "fbgemm_fp8"})
    source = opened(tmp_path)
    assert torch.equal(read_all(source)["w"], numbers(codes, scales, (64, 1)))
    part = RowWindows(source, {"w": Rows(start=1, stop=2)})
    assert torch.equal(read_all(part)["w"], numbers(codes, scales, (64, 1))[1:])


@pytest.mark.parametrize("beside", ["w_zero_point", "w_g_idx", "w_scale_2", "w_global_scale", "pre_quant_scale"])
def test_weights_that_scales_alone_do_not_make_are_refused(tmp_path, beside):
    """Columns in another order, zero points, a second scale, and factors of inputs change what codes stand for."""
    tensors = {"q.w": torch.randn(8, 32).to(E4M3), "q.w_scale": torch.ones(8, 1), f"q.{beside}": torch.ones(32)}
    with pytest.raises(
        CheckpointError, match=r"1 tensors in FP8 have a scale of an unknown kind: q\.w_scale of q\.w in"
    ):
        opened(write(tmp_path, tensors))
    write(tmp_path, tensors, {"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="quantized already: compressed-tensors, which bigq does not read"):
        Checkpoint.open(tmp_path)


def test_what_the_model_holds_itself_is_no_scale(tmp_path):
    codes, scales = in_fp8(torch.randn(32, 32), (32, 32))
    tensors = {"a.weight": codes, "a.weight_scale": scales, "table": codes, "table_scale": scales}
    tensors |= {"a.input_scale": torch.ones(1)}
    source = Checkpoint.open(write(tmp_path, tensors, FP8, dtype="bfloat16"))
    source = with_scaled(source, tmp_path, lambda: {"table_scale", "a.input_scale"})
    assert source.tensors.keys() == {"a.weight", "table", "table_scale", "a.input_scale"}
    assert torch.equal(read_tensor(source.tensors["table"]).view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(read_tensor(source.tensors["a.weight"]), numbers(codes, scales, (32, 32)))


def test_experts_whose_scales_are_unknown_are_refused_before_they_are_stacked(tmp_path):
    """Of a stack, or of a renamed tensor, nothing shows any more that a scale was beside it."""
    tensors = {f"{name}.weight": torch.randn(8, 32).to(E4M3) for name in "ab"}
    with pytest.raises(CheckpointError, match=r"2 tensors in FP8.*: a\.qscale_weight of a\.weight in"):
        opened(write(tmp_path, tensors | {f"{name}.qscale_weight": torch.ones(1) for name in "ab"}))


def test_floats_are_left_alone(tmp_path):
    save_file(
        {"w": torch.randn(3, 3), "w_scale": torch.ones(1), "flags": torch.zeros(4, 4, dtype=torch.uint8)},
        tmp_path / "a.safetensors",
    )
    source = Checkpoint.open(tmp_path)
    assert with_scaled(source, tmp_path) is source


@pytest.mark.parametrize(
    "shape, scales, said, words",
    [
        ((200, 300), (2, 3), {"quant_method": "fp8"}, r"\[2, 3\] for .* \[200, 300\], and config.json does not say"),
        ((200, 300), (2, 2), FP8, r"\[2, 2\] for a weight of \[200, 300\], and blocks are \[128, 128\]"),
        ((200, 300), (300,), FP8, r"\[300\] for a weight of \[200, 300\]"),
        ((3, 200, 300), (2, 2, 3), FP8, r"\[2, 2, 3\] for a weight of \[3, 200, 300\]"),
        ((3, 200, 300), (1,), FP8, r"\[1\] for a weight of \[3, 200, 300\]"),
        ((200, 300), (2, 3), FP8 | {"a": {"block_structure": [64, 64]}}, ".*does not say how large"),
        ((200, 300), (2, 3), FP8 | {"weight_block_size": [0, 128]}, ".*does not say how large"),
    ],
    ids=["no block size", "another", "columns", "fewer experts", "one for a stack", "two sizes", "a block of none"],
)  # fmt: skip
def test_scales_that_do_not_fit_are_refused_by_name(tmp_path, shape, scales, said, words):
    write(tmp_path, {"a.weight": torch.zeros(shape).to(E4M3), "a.weight_scale_inv": torch.ones(scales)}, said)
    with pytest.raises(
        CheckpointError, match=r"1 scales do not fit.*\n  - a.weight_scale_inv in .*safetensors: " + words
    ):
        opened(tmp_path)


def test_many_scales_that_do_not_fit_are_counted(tmp_path):
    tensors = {}
    for i in range(12):
        tensors |= {f"{i}": torch.zeros(4, 6).to(E4M3), f"{i}_scale": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"(?s)12 scales do not fit.*and 2 more"):
        opened(write(tmp_path, tensors, FP8))


def test_a_weight_both_in_floats_and_in_codes_is_refused(tmp_path):
    blocks, exponents = mxfp4(1, 2, 32)
    write(tmp_path, {"e": torch.ones(1), "e_blocks": blocks, "e_scales": exponents})
    with pytest.raises(CheckpointError, match="holds 'e' both in floats and in codes"):
        opened(tmp_path)


def test_a_scale_that_is_cut_short_is_an_error(tmp_path):
    codes, scales = in_fp8(torch.randn(256, 256), (128, 128))
    write(tmp_path, {"w": codes}, FP8)
    save_file({"w_scale_inv": scales}, tmp_path / "other.safetensors")
    names = ["model.safetensors", "other.safetensors"]
    source = with_scaled(Checkpoint.open_files([tmp_path / name for name in names]), tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        read_tensor(source.tensors["w"])


@pytest.mark.parametrize("is_ended", [True, False], ids=["to the end", "given up"])
def test_files_of_scales_are_closed_after_a_read(tmp_path, is_ended):
    tensors = {name: in_fp8(torch.randn(64, 64), (64, 64)) for name in "abc"}
    files = [write(tmp_path, {name: codes for name, (codes, _) in tensors.items()}, FP8) / "model.safetensors"]
    for name, (_, scales) in tensors.items():
        files.append(tmp_path / f"{name}.safetensors")
        save_file({f"{name}_scale": scales}, files[-1])
    source, before = with_scaled(Checkpoint.open_files(files), tmp_path), len(os.listdir("/proc/self/fd"))
    reading = source.read(list("abc"))
    for name, found in reading:
        assert torch.equal(found, numbers(*tensors[name], (64, 64)))
        if not is_ended:
            break
    reading.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")  # torch's, and once a process
@pytest.mark.parametrize("layout", [*LAYOUTS, "mxfp4"])
def test_a_gpu_makes_the_same_numbers(tmp_path, layout):
    if layout == "mxfp4":
        codes, scales = mxfp4(3, 10, 96)
        write(tmp_path, {"w_blocks": codes, "w_scales": scales})
    else:
        shape, block, stored_as = LAYOUTS[layout]
        codes, scales = in_fp8(torch.randn(shape), block)
        scales = scales if stored_as is None else scales.reshape(stored_as)
        write(tmp_path, {"w": codes, "w_scale": scales}, GROUPS if layout == "groups of columns" else FP8)
    stored = opened(tmp_path).tensors["w"]
    made = stored.coding.decode(codes.view(torch.uint8).cuda())
    assert made.is_cuda
    assert torch.equal(made.cpu(), read_tensor(stored))
    on_gpu = codes.view(torch.uint8).cuda(), scales.contiguous().flatten().view(torch.uint8).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        beside = stored.coding.decode(on_gpu[0], 0, on_gpu[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(beside, made)


def test_numbers_on_meta_have_a_shape():
    read = partial(pytest.fail, "read")
    scales = Scales(name="s", dtype=torch.float32, groups=1, spans=(), read=read, first=0, rows=1, skipped=0, count=6)
    coding = ScaledRows(codes=E4M3, shape=(6, 8), dtype=BF16, scales=(scales,), width=8)
    made = coding.decode(torch.empty(6, 8, dtype=torch.uint8, device="meta"))
    assert (made.device.type, made.shape, made.dtype) == ("meta", (6, 8), BF16)
