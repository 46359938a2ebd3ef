"""A load of FP8, int8 or MXFP4 with scales is, bit for bit, the load of the numbers that these stand for."""

import json
import os
import resource

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn

import bigq
from bigq import CheckpointError, QuantizationConfig, load_and_quantize_model
from bigq.checkpoint import LocalFile
from bigq.model.tree import ModelTree
from bigq.open_source import open_source
from scaled_checkpoints import e2m1_numbers, in_fp8, numbers, write

BLOCK = (32, 64)
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}


class Net(nn.Module):
    """Linears whose sizes blocks do not divide, a stack, and tensors that are kept."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(96, 200), nn.Linear(200, 96)) for _ in range(2))
        self.stack = nn.Parameter(torch.randn(5, 70, 96))
        self.head = nn.Linear(96, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + torch.stack([torch.nn.functional.linear(x, w)[..., :1] for w in self.stack]).sum(0))


@pytest.fixture
def folders(tmp_path):
    """A folder of codes, and one of the numbers that they stand for, as other libraries write them."""
    codes, floats = {}, {}
    for name, tensor in Net().state_dict().items():
        if tensor.ndim > 1 and "embed" not in name:
            coded, scales = in_fp8(tensor, BLOCK)
            codes |= {name: coded, f"{name}_scale_inv": scales}
            floats[name] = numbers(coded, scales, BLOCK)
        else:
            codes[name] = floats[name] = tensor.bfloat16()
    return write(tmp_path / "codes", codes, FP8), write(tmp_path / "floats", floats)


def load(folder, config, device_map="cpu", **arguments):
    with init_empty_weights():
        model = Net().eval()
    return load_and_quantize_model(model, folder, config, device_map, progress=False, **arguments)


def assert_equal(model, other):
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


CONFIGS = {
    "nf4": QuantizationConfig("nf4", also_quantize=["stack"]),
    "double quant": QuantizationConfig("nf4", double_quant=True, also_quantize=["stack"]),
    "int8": QuantizationConfig("int8", also_quantize=["stack", "embed", "head"]),
    "kept": QuantizationConfig("nf4", skip_modules=["blocks.0", "blocks.1.1", "stack"]),
    "float32": QuantizationConfig("fp4", dtype=torch.float32, keep_in_fp32_modules=["blocks.1"]),
}


@pytest.mark.parametrize("budget", [None, 1 << 20], ids=["ample", "small"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_load_of_codes_is_that_of_their_numbers(folders, config, budget):
    codes, floats = folders
    model = load(codes, CONFIGS[config], read_budget=budget)
    assert_equal(model, load(floats, CONFIGS[config]))
    ids = torch.arange(14).view(2, 7)
    assert torch.isfinite(model(ids)).all()


def test_pieces_of_a_large_weight(tmp_path, monkeypatch):
    """A weight beyond the budget arrives in pieces, each of which has its own part of the scales."""
    weight, scales = in_fp8(torch.randn(3000, 512), (128, 128))
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    codes = write(tmp_path / "codes", {"0.weight": weight, "0.weight_scale_inv": scales}, said)
    floats = write(tmp_path / "floats", {"0.weight": numbers(weight, scales, (128, 128))})

    def one(folder, **arguments):
        with init_empty_weights():
            model = nn.Sequential(nn.Linear(512, 3000, bias=False))
        config = QuantizationConfig("nf4", skip_defaults=False)
        return load_and_quantize_model(model, folder, config, "cpu", progress=False, **arguments)

    pieces = []
    decode = bigq.checkpoint.scaled_rows.ScaledRows.decode
    monkeypatch.setattr(
        bigq.checkpoint.scaled_rows.ScaledRows,
        "decode",
        lambda self, codes, start, scales: pieces.append((start, len(codes))) or decode(self, codes, start, scales),
    )
    model = one(codes, read_budget=1 << 20)
    assert len(pieces) > 8
    assert sum(count for _, count in pieces) == 3000
    assert_equal(model, one(floats))


def test_pieces_read_their_own_scales(tmp_path, monkeypatch):
    """All exponents of a stack of gpt-oss-120b are 265 MB in float32: too many to read them for each piece."""
    blocks = torch.randint(0, 256, (8, 200, 32, 16), dtype=torch.uint8)
    exponents = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8)
    weight, scales = in_fp8(torch.randn(3000, 512), (1, 512))
    tensors = {"stack_blocks": blocks, "stack_scales": exponents, "w": weight, "w_scale": scales}
    write(tmp_path / "codes", tensors, {"quant_method": "mxfp4"})
    floats = {"stack": e2m1_numbers(blocks.flatten(-2), exponents).mT, "w": numbers(weight, scales, (1, 512))}

    def one(folder, **arguments):
        with init_empty_weights():
            model = nn.Module()
            model.stack, model.w = nn.Parameter(torch.empty(8, 1024, 200)), nn.Parameter(torch.empty(3000, 512))
        config = QuantizationConfig("nf4", also_quantize=["stack", "w"])
        return load_and_quantize_model(model, folder, config, "cpu", progress=False, **arguments)

    expected, reads = one(write(tmp_path / "floats", floats)), []
    read_into = LocalFile.read_into
    monkeypatch.setattr(LocalFile, "read_into", lambda *args: reads.append(len(args[1])) or read_into(*args))
    assert_equal(one(tmp_path / "codes", read_budget=1 << 20), expected)
    assert len(reads) > 20
    assert sum(reads) == sum(tensor.nbytes for tensor in tensors.values())


def test_scales_in_more_files_than_may_be_open(tmp_path):
    codes, floats, files = {}, {}, []
    for i in range(150):
        coded, scales = in_fp8(torch.randn(64, 64), (64, 64))
        codes[f"{i}.weight"], floats[f"{i}.weight"] = coded, numbers(coded, scales, (64, 64))
        save_file({f"{i}.weight_scale": scales}, tmp_path / f"{i}.safetensors")
        files.append(tmp_path / f"{i}.safetensors")
    files.insert(0, write(tmp_path, codes, {"quant_method": "fp8"}) / "model.safetensors")

    def one(location):
        with init_empty_weights():
            model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(150)))
        config = QuantizationConfig("nf4", skip_defaults=False)
        return load_and_quantize_model(model, location, config, "cpu", progress=False)

    expected = one(write(tmp_path / "floats", floats))
    index = {"weight_map": {name: file.name for file in files for name in load_file(file)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    limits, open_now = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 100, limits[1]))
    try:
        model = one(tmp_path / "model.safetensors.index.json")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_equal(model, expected)
    assert len(os.listdir("/proc/self/fd")) == open_now


@pytest.mark.parametrize("offload", ["preserve", "quantized"])
def test_offloaded_to_the_disk(folders, offload, tmp_path):
    codes, floats = folders
    places = {"": "cpu", "blocks": "disk", "stack": "disk"}
    arguments = {"offload_folder": tmp_path / "offload", "offload": offload}
    config = CONFIGS["nf4"]
    assert_equal(load(codes, config, places, **arguments), load(floats, config, places, **arguments))


def test_what_is_read_are_the_codes_and_their_scales(folders):
    codes, floats = folders
    model = load(codes, CONFIGS["nf4"])
    stages = {stage.name: stage for stage in model.quantization_report.stages}
    held, made = load_file(codes / "model.safetensors"), load_file(floats / "model.safetensors")
    assert stages["read"].nbytes == sum(tensor.nbytes for tensor in held.values())
    assert stages["decode"].nbytes == sum(made[name.removesuffix("_scale_inv")].nbytes for name in held.keys() - made)
    assert "decode" not in {stage.name for stage in load(floats, CONFIGS["nf4"]).quantization_report.stages}


def test_nan_in_a_scale_is_refused_by_the_name_of_the_weight(folders, tmp_path):
    codes, _ = folders
    tensors = load_file(codes / "model.safetensors")
    tensors["blocks.1.0.weight_scale_inv"][1, 1] = float("nan")
    with pytest.raises(CheckpointError, match=r"1 weights hold NaN or Inf.*\n.*blocks.1.0.weight in"):
        load(write(tmp_path / "nan", tensors, FP8), CONFIGS["nf4"])


def test_a_folder_of_codes_is_quantized_and_loads(folders, tmp_path):
    codes, floats = folders
    (codes / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')  # of modelopt
    (codes / "config.json").write_text(json.dumps({"quantization_config": FP8, "own": 3}))
    with init_empty_weights():
        skeleton = Net()
    made = bigq.quantize_checkpoint(codes, tmp_path / "nf4", CONFIGS["nf4"], model=skeleton, device="cpu")
    assert made.quantized == 5
    assert not (tmp_path / "nf4" / "hf_quant_config.json").exists()
    assert json.loads((tmp_path / "nf4" / "config.json").read_text()) == {"own": 3}, "what it was before is not said"
    assert_equal(load(tmp_path / "nf4", None), load(floats, CONFIGS["nf4"]))


def test_int8_of_compressed_tensors_that_was_saved_here(folders, tmp_path):
    """The codes that `save_quantized` writes in that layout come back as the numbers that they stand for."""
    _, floats = folders
    config = QuantizationConfig("int8")
    model = load(floats, config)
    bigq.save_quantized(model, tmp_path / "compressed", layout="compressed-tensors")
    (tmp_path / "compressed" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "compressed-tensors"}}'
    )
    with init_empty_weights():
        again = Net().eval()
    again = load_and_quantize_model(again, tmp_path / "compressed", QuantizationConfig("nf4"), "cpu", progress=False)
    expected = bigq.quantize_tensor(model.blocks[0][0].dequantize(torch.float32).bfloat16(), "nf4")
    assert torch.equal(again.blocks[0][0].weight_packed, expected.tensors["packed"])


class TestTransformers:
    @pytest.fixture(autouse=True)
    def transformers(self):
        return pytest.importorskip("transformers")

    def mixture(self, tmp_path, model, block=None):
        """Folders of a transformers model: its linears and experts in FP8, and the numbers of that."""
        model.to(torch.bfloat16).save_pretrained(tmp_path / "original")
        state = load_file(tmp_path / "original" / "model.safetensors")
        codes, floats = {}, {}
        for name, tensor in state.items():
            if tensor.ndim > 1 and ("experts." in name or "self_attn" in name):
                coded, scales = in_fp8(tensor, block)
                codes |= {name: coded, f"{name}_scale_inv": scales}
                floats[name] = numbers(coded, scales, block)
            else:
                codes[name] = floats[name] = tensor
        config = model.config.to_dict() | {"dtype": "bfloat16"}
        said = {"quant_method": "fp8", "weight_block_size": list(block)}
        return write(tmp_path / "codes", codes, said, **config), write(tmp_path / "floats", floats, **config)

    @pytest.fixture
    def qwen(self, transformers, tmp_path):
        sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
        experts = {"num_experts": 5, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
        torch.manual_seed(0)
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads, **experts))
        return self.mixture(tmp_path, model, block=(16, 32))

    def skeleton(self, transformers, folder):
        with init_empty_weights():
            return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()

    def test_experts_one_by_one_are_stacked_as_codes(self, transformers, qwen):
        codes, floats = qwen
        skeleton = self.skeleton(transformers, floats)
        source, _ = open_source(ModelTree(skeleton), codes, strict=True)
        stored = source.tensors["model.layers.0.mlp.experts.gate_up_proj"]
        assert (len(stored.spans) > 1, stored.nbytes) == (True, 5 * 96 * 64)
        for name in ("nf4", "int8"):
            config = QuantizationConfig(name)
            model = load_and_quantize_model(self.skeleton(transformers, floats), codes, config, "cpu", progress=False)
            other = load_and_quantize_model(self.skeleton(transformers, floats), floats, config, "cpu", progress=False)
            assert_equal(model, other)
            ids = torch.arange(10)[None]
            assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)

    def test_from_pretrained(self, transformers, qwen, tmp_path):
        codes, floats = qwen
        nf4 = QuantizationConfig("nf4")
        model = transformers.AutoModelForCausalLM.from_pretrained(codes, quantization_config=nf4)
        other = transformers.AutoModelForCausalLM.from_pretrained(floats, quantization_config=nf4)
        assert_equal(model, other)
        assert model.config.quantization_config == other.config.quantization_config
        model.save_pretrained(tmp_path / "saved")
        assert_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), other)

    def test_from_pretrained_refuses_other_codes_by_name(self, transformers, qwen, tmp_path):
        codes, _ = qwen
        content = json.loads((codes / "config.json").read_text())
        del content["quantization_config"]
        tensors = {"q.qweight": torch.ones(2, 2, dtype=torch.int32)}
        awq = write(tmp_path / "awq", tensors, {"quant_method": "awq", "bits": 4}, **content)
        with pytest.raises(CheckpointError, match="quantized already: AWQ, which bigq does not read"):
            transformers.AutoModelForCausalLM.from_pretrained(awq, quantization_config=QuantizationConfig("nf4"))

    def test_what_transformers_decodes_itself_has_the_same_numbers(self, transformers, qwen):
        codes, _ = qwen
        decoded = transformers.FineGrainedFP8Config(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(codes, quantization_config=decoded, dtype="bfloat16")
        config = QuantizationConfig("nf4", skip_modules=["experts"])
        ours = transformers.AutoModelForCausalLM.from_pretrained(codes, quantization_config=config)
        kept = [name for name in ours.state_dict() if "gate_up" in name]  # transformers takes whole blocks only
        assert len(kept) == 2
        for name in kept:
            assert torch.equal(ours.state_dict()[name], model.state_dict()[name]), name

    def test_quantized_into_a_folder_that_from_pretrained_loads(self, transformers, qwen, tmp_path):
        codes, floats = qwen
        bigq.quantize_checkpoint(codes, tmp_path / "nf4", "nf4", device="cpu")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
        other = transformers.AutoModelForCausalLM.from_pretrained(floats, quantization_config=QuantizationConfig("nf4"))
        assert_equal(model, other)

    def test_gpt_oss_in_mxfp4(self, transformers, tmp_path):
        sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads)).to(torch.bfloat16)
        codes, floats = {}, {}
        for name, tensor in model.state_dict().items():
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, inputs, outputs = tensor.shape
                blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
                exponents = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8)
                codes |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
                floats[name] = e2m1_numbers(blocks.flatten(-2), exponents).mT
            else:
                codes[name] = floats[name] = tensor
        config = model.config.to_dict() | {"dtype": "bfloat16"}
        codes = write(tmp_path / "codes", codes, {"quant_method": "mxfp4"}, **config)
        floats = write(tmp_path / "floats", floats, **config)
        for name, budget in (("nf4", None), ("nf4", 1 << 20), ("int8", None)):
            both = [
                load_and_quantize_model(
                    self.skeleton(transformers, floats),
                    folder,
                    QuantizationConfig(name),
                    "cpu",
                    read_budget=budget,
                    progress=False,
                )
                for folder in (codes, floats)
            ]
            assert_equal(*both)
            ids = torch.arange(10)[None]
            assert torch.equal(both[0](input_ids=ids).logits, both[1](input_ids=ids).logits)
