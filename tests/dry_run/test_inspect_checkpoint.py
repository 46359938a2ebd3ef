"""Who quantized a checkpoint, how many parameters it has, and whether bigq reads it, from headers alone."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

import bigq
from bigq import NF4, CheckpointError, QuantizationConfig
from bigq.checkpoint.gguf import read_gguf
from bigq.dry_run.inspect_checkpoint import inspect_checkpoint

N, K, LAYERS = 32, 128, 3
INT4 = {"bits": 4, "group_size": 64}


def gptq(bits=4):
    return {
        "qweight": torch.zeros(K * bits // 32, N, dtype=torch.int32),
        "qzeros": torch.zeros(K // 64, N * bits // 32, dtype=torch.int32),
        "scales": torch.zeros(K // 64, N, dtype=torch.float16),
        "g_idx": torch.zeros(K, dtype=torch.int32),
    }


FOREIGN = {  # tensors of a linear [N, K] beside its bias, and what config.json says
    "GPTQ": (gptq(), {"quant_method": "gptq", **INT4}),
    "GPTQ in 3 bits": (gptq(3), {"quant_method": "gptq", "bits": 3, "group_size": 64}),
    "AWQ": (
        {
            "qweight": torch.zeros(K, N // 8, dtype=torch.int32),
            "qzeros": torch.zeros(K // 64, N // 8, dtype=torch.int32),
            "scales": torch.zeros(K // 64, N, dtype=torch.float16),
        },
        {"quant_method": "awq", **INT4},
    ),
    "HQQ": (
        {
            "W_q": torch.zeros(N * K // 2 // 64, 64, dtype=torch.uint8),
            "scale": torch.zeros(N * K // 64, 1),
            "zero": torch.zeros(N * K // 64, 1),
            "shape": torch.tensor([N, K]),
        },
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    ),
    "compressed-tensors": (
        {
            "weight_packed": torch.zeros(N, K // 8, dtype=torch.int32),
            "weight_scale": torch.zeros(N, 1),
            "weight_shape": torch.tensor([N, K]),
        },
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    ),
    "quanto": (
        {"weight._data": torch.zeros(N // 2, K, dtype=torch.uint8), "weight._scale": torch.zeros(N, 1)},
        {"quant_method": "quanto", "weights": "int4"},
    ),
    "FP8 with scales": (
        {"weight": torch.zeros(N, K).to(torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(1, 1)},
        {"quant_method": "fp8"},
    ),
    "MXFP4": (
        {
            "gate_blocks": torch.zeros(N, K // 32, 16, dtype=torch.uint8),
            "gate_scales": torch.zeros(N, K // 32, dtype=torch.uint8),
        },
        {"quant_method": "mxfp4"},
    ),
    "torchao": ({"weight_qdata": torch.zeros(N, K // 2, dtype=torch.uint8)}, {"quant_method": "torchao"}),
    "of tomorrow": ({"weight": torch.zeros(N, K, dtype=torch.int8)}, {"quant_method": "of tomorrow"}),
}


def write(folder, linear, said):
    """A model with this linear, and its bias, in each layer, and an embedding."""
    tensors = {f"layers.{i}.q.{name}": tensor.clone() for i in range(LAYERS) for name, tensor in linear.items()}
    tensors |= {f"layers.{i}.q.bias": torch.zeros(N, dtype=torch.float16) for i in range(LAYERS)}
    tensors["embed.weight"] = torch.zeros(10, K, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], **({"quantization_config": said} if said else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", FOREIGN)
def test_what_other_libraries_quantized(name, tmp_path):
    linear, said = FOREIGN[name]
    nbytes = write(tmp_path, linear, said)
    found = inspect_checkpoint(tmp_path)
    assert found.quantized_by == name.partition(" in ")[0]
    assert (found.nbytes, found.model) == (nbytes, "LlamaForCausalLM")
    assert sum(group.nbytes for group in found.groups) == nbytes
    is_decoded = name == "FP8 with scales"
    assert found.is_readable == is_decoded
    assert ("bigq decodes it while it loads it" if is_decoded else "take the original weights") in found.advice
    if name in ("torchao", "of tomorrow"):
        assert found.parameters is None
        assert found.bits is None
    else:
        assert found.parameters == LAYERS * (N * K + N) + 10 * K
        (group,) = [group for group in found.groups if group.is_quantized]
        assert (group.count, group.parameters) == (LAYERS, LAYERS * N * K)
        assert group.nbytes == LAYERS * sum(tensor.nbytes for tensor in linear.values())
        assert group.format.startswith(found.quantized_by)
    assert json.loads(json.dumps(found.to_dict()))["nbytes"] == nbytes


def test_stacks_and_packed_codes_are_counted_once_and_as_what_they_become(tmp_path):
    """Two weights of one module, and experts with two codes in a byte."""
    codes = torch.zeros(3, N, K).to(torch.float8_e4m3fn)
    linear = {
        "up": codes,
        "up_scale_inv": torch.ones(3, 1, 1),
        "down": codes,
        "down_scale_inv": torch.ones(3, 1, 1),
        "e.weight": torch.zeros(N, K // 2, dtype=torch.int8),
        "e.weight_scale_inv": torch.full((N, K // 32), 127, dtype=torch.uint8),
        "e.input_scale": torch.ones(1),
    }
    nbytes = write(tmp_path, linear, {"quant_method": "fp8"})
    found = inspect_checkpoint(tmp_path)
    assert (found.quantized_by, found.is_readable, found.nbytes) == ("FP8 with scales and MXFP4", True, nbytes)
    assert sum(group.nbytes for group in found.groups) == nbytes
    groups = {group.name.rpartition(".")[2]: group for group in found.groups if group.is_quantized}
    assert {name: (g.format, g.count, g.parameters) for name, g in groups.items()} == {
        "up": ("FP8 with scales", LAYERS, LAYERS * 3 * N * K),
        "down": ("FP8 with scales", LAYERS, LAYERS * 3 * N * K),
        "e": ("MXFP4", LAYERS, LAYERS * N * K),
    }


def test_scales_beside_float8_say_it_without_a_config(tmp_path):
    write(tmp_path, FOREIGN["FP8 with scales"][0], None)
    found = inspect_checkpoint(tmp_path)
    assert (found.quantized_by, found.is_readable) == ("FP8 with scales", True)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scales"])
def test_scales_of_unknown_names_are_not_read(tmp_path, scale):
    write(tmp_path, {"weight": torch.zeros(N, K).to(torch.float8_e4m3fn), scale: torch.ones(1)}, None)
    found = inspect_checkpoint(tmp_path)
    assert (found.quantized_by, found.is_readable) == ("FP8 with scales", False)


@pytest.mark.parametrize("layout", ["bigq", "bitsandbytes"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_what_bigq_reads(name, layout, tiny, tmp_path):
    model = tiny(width=64)
    parameters = bigq.num_parameters(model)
    buffers = sum(tensor.numel() for buffer, tensor in model.named_buffers() if buffer != "mask")
    bigq.load_and_quantize_model(model, None, QuantizationConfig(name), "cpu")
    bigq.save_quantized(model, tmp_path, layout=layout)
    found = inspect_checkpoint(tmp_path)
    assert (found.quantized_by, found.is_readable) == (layout, True)
    assert found.parameters == parameters + buffers
    quantized = {(group.name, group.format, group.count) for group in found.groups if group.is_quantized}
    words = {"nf4": "nf4, block_size=64", "int8": "int8, threshold=6.0" if layout == "bigq" else "int8"}[name]
    assert quantized == {("blocks.*.down.weight", words, 3), ("blocks.*.up.weight", words, 3)}
    (file,) = tmp_path.glob("*.safetensors")
    assert found.files == (file.name,)
    assert inspect_checkpoint(file).groups == found.groups
    assert found.nbytes < file.stat().st_size < found.nbytes + 20_000


def test_several_formats_and_a_placeholder(tiny, tmp_path):
    rules = {"head": "int8", "blocks.0.up": NF4(block_size=32, double_quant=True)}
    model = bigq.load_and_quantize_model(tiny(), None, QuantizationConfig("nf4", rules=rules), "cpu")
    bigq.save_quantized(model, tmp_path)
    formats = inspect_checkpoint(tmp_path).formats
    assert {name: row["count"] for name, row in formats.items()} == {
        "nf4, block_size=32, double_quant": 1,
        "nf4, block_size=64": 5,
        "int8, threshold=6.0": 1,
        "float32": 12,
        "int64": 1,
    }
    assert formats["int8, threshold=6.0"] == {"count": 1, "parameters": 50 * 72, "nbytes": 50 * 72 + 50 * 4 + 256}


def test_weights_that_are_not_quantized(checkpoint, tiny):
    found = inspect_checkpoint(checkpoint, max_memory={0: 100, "cpu": "1GB"})
    assert (found.quantized_by, found.is_readable, found.model) == (None, True, None)
    assert found.bits == 8 * found.nbytes / found.parameters
    assert (dict(found.limits), found.fits) == ({"cuda:0": 100, "cpu": 10**9}, False)
    assert inspect_checkpoint(checkpoint, max_memory={"cpu": found.nbytes}).fits is True
    assert inspect_checkpoint(checkpoint, max_memory={0: 100, "disk": "1GB"}).fits is False
    assert inspect_checkpoint(checkpoint, max_memory={"disk": "1GB"}).fits is None
    if not torch.cuda.is_available():
        assert inspect_checkpoint(checkpoint).fits is None


def test_an_adapter(tmp_path):
    save_file({"q.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert not found.is_readable
    assert "LoRA adapter and no model" in found.advice


def gguf(tensors):
    """A GGUF file of (name, shape, type, bytes), with metadata of every kind."""

    def text(words):
        return struct.pack("<Q", len(words)) + words.encode()

    metadata = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("scales") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
    ]
    infos, offset = [], 0
    for name, shape, kind, nbytes in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos.append(text(name) + dimensions + struct.pack("<IQ", kind, offset))
        offset += -(-nbytes // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join([*metadata, *infos])
    return header + bytes(-len(header) % 32) + bytes(offset)


def test_gguf(tmp_path):
    blocks = [(f"blk.{i}.attn_q.weight", (32, 256), 12, 32 * 144) for i in range(2)]
    path = tmp_path / "model.Q4_K.gguf"
    data = gguf([("token_embd.weight", (10, 256), 1, 5120), *blocks])
    path.write_bytes(data)
    for location in (path, tmp_path):
        found = inspect_checkpoint(location)
        assert (found.quantized_by, found.model, found.is_readable) == ("GGUF of llama.cpp", "llama", False)
        assert [(group.name, group.format, group.count, group.nbytes) for group in found.groups] == [
            ("token_embd.weight", "F16", 1, 5120),
            ("blk.*.attn_q.weight", "Q4_K", 2, 2 * 32 * 144),
        ]
        assert found.parameters == 10 * 256 + 2 * 32 * 256
        assert found.settings == {"general.architecture": "llama", "general.alignment": 32}
    for damaged in (data[:100], b"GGUF" + b"\xff" * 40, data[:-8192]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged GGUF header"):
            read_gguf(path)


def test_refusals(tmp_path, checkpoint):
    for location, words in {tmp_path / "absent": "no such file", tmp_path: "holds no checkpoint"}.items():
        with pytest.raises(CheckpointError, match=words):
            inspect_checkpoint(location)
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        inspect_checkpoint(checkpoint)
