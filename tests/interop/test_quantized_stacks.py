"""quantized_stacks: experts that bitsandbytes has quantized one by one, in models that hold them in one."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigq import NF4, QuantizationConfig, load_and_quantize_model, save_quantized
from bigq.checkpoint import Checkpoint, Converted, Renamed
from bigq.errors import CheckpointError
from bigq.interop.quantized_stacks import Stack, stack_conversions
from bigq.model.tree import ModelTree
from bigq.open_source import open_source

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers' conversions of names")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing it is not silent on every CPU
    bnb = pytest.importorskip("bitsandbytes")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}


def mixtral(**settings):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 3, **settings})
    return transformers.MixtralForCausalLM(config).bfloat16().eval()


def qwen(**settings):
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**{**SIZES, **QWEN, **settings})
    return transformers.Qwen2MoeForCausalLM(config).bfloat16().eval()


MODELS = {  # how to build it, where its experts are in a file, and their linears: gate, up and down
    "mixtral": (mixtral, "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen2-moe": (qwen, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
KINDS = {
    "nf4": {"quant_type": "nf4", "blocksize": 64},
    "fp4": {"quant_type": "fp4", "blocksize": 64},
    "double": {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True},
    "int8": None,
}


def quantized_by_them(weight, kind):
    """{what follows the name of the weight: tensor} of bitsandbytes, and the numbers that they stand for."""
    if kind is None:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        dense = (codes.float() * scales[:, None] * (1 / 127)).bfloat16()
        return {"weight": codes, "SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}, dense
    codes, state = bnb.functional.quantize_4bit(weight, **kind)
    described = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    state.shape = (1, weight.numel())  # rows with blocks that run on are decoded wrong on the CPU (bitsandbytes 0.50)
    return {"weight": codes, **described}, bnb.functional.dequantize_4bit(codes, state).view(weight.shape)


def saved_by_them(model, folder, kinds):
    """Save `model` with the weights quantized for which `kinds(name)` returns a kind; the numbers of these."""
    model.save_pretrained(folder)
    tensors, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kind = kinds(name)
        if kind == "float":
            tensors[name] = tensor
            continue
        parts, dense[name] = quantized_by_them(tensor, kind)
        tensors |= {f"{name.removesuffix('weight')}{end}": part.clone() for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return dense


def in_linears(kind):
    """The kind of every linear but the head, the router and the gate of a shared expert, as transformers 4 had them."""
    return lambda name: kind if "proj.weight" in name or "experts." in name else "float"


def loaded(empty, build, folder):
    model = empty(build)
    model.tie_weights()
    return load_and_quantize_model(model, folder, None, "cpu", progress=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_experts_have_the_numbers_of_theirs(empty, tmp_path, name, kind):
    build, where, linears = MODELS[name]
    dense = saved_by_them(build(), tmp_path, in_linears(KINDS[kind]))
    model = loaded(empty, build, tmp_path)
    for i, layer in enumerate(model.model.layers):
        gate, up, down = (
            torch.stack([dense[f"model.layers.{i}.{where}.{e}.{linear}.weight"] for e in range(3)])
            for linear in linears
        )
        experts = layer.mlp.experts
        found = experts.gate_up_proj.dequantize(), experts.down_proj.dequantize()
        for ours, theirs in zip(found, (torch.cat([gate, up], dim=1), down), strict=True):
            assert ours.dtype == theirs.dtype == torch.bfloat16
            if kind == "int8":
                torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=0)  # they divide by 127 in another order
            else:
                assert torch.equal(ours, theirs)
        assert experts.gate_up_proj_packed.shape[:2] == found[0].shape[:2]
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_codes_are_read_where_they_lie_and_a_saved_model_loads(empty, tmp_path):
    saved_by_them(mixtral(), tmp_path / "theirs", in_linears(KINDS["nf4"]))
    model = empty(mixtral)
    source, _ = open_source(ModelTree(model), tmp_path / "theirs", strict=True)
    for leaf in ("gate_up_proj", "down_proj"):
        for part in ("packed", "absmax"):
            assert source.tensors[f"model.layers.1.mlp.experts.{leaf}_{part}"].spans, (leaf, part)
    device_map = {"": "cpu", "model.layers.1": "disk"}
    model = load_and_quantize_model(model, tmp_path / "theirs", None, device_map, progress=False)
    save_quantized(model, tmp_path / "ours")
    again = loaded(empty, mixtral, tmp_path / "ours").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, again[name])] == []


def test_rows_with_blocks_that_run_on_become_floats(empty, tmp_path):
    """96 numbers are no multiple of 64, so the experts' down projections are dequantized, and a warning says so."""

    def build():
        return qwen(moe_intermediate_size=96, shared_expert_intermediate_size=128)

    dense = saved_by_them(build(), tmp_path, in_linears(KINDS["nf4"]))
    with pytest.warns(UserWarning, match=r"6 weights of .* are dequantized"):
        experts = loaded(empty, build, tmp_path).model.layers[1].mlp.experts
    expected = [dense[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(3)]
    assert torch.equal(experts.down_proj, torch.stack(expected))
    assert list(experts.descriptions) == ["gate_up_proj"]


@pytest.mark.parametrize(
    "odd, reason",
    [
        ("float", r"experts.0.w1.weight is quantized, and .*experts.1.w3.weight is not"),
        (KINDS["fp4"], r"experts.0.w1.weight is format nf4, .* and .*experts.1.w3.weight is format fp4, "),
        (KINDS["double"], r"double_quant False, .* double_quant True"),
    ],
    ids=["float", "fp4", "double"],
)
def test_experts_that_are_not_quantized_alike_are_refused_by_name(empty, tmp_path, odd, reason):
    usual = in_linears(KINDS["nf4"])
    saved_by_them(mixtral(), tmp_path, lambda name: odd if "1.block_sparse_moe.experts.1.w3" in name else usual(name))
    with pytest.raises(CheckpointError, match=rf"{reason}(?s:.)*load the original weights") as error:
        loaded(empty, mixtral, tmp_path)
    assert "layers.0" not in str(error.value)


def test_a_missing_expert_is_named(empty, tmp_path):
    saved_by_them(mixtral(), tmp_path, in_linears(KINDS["nf4"]))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "0.block_sparse_moe.experts.2.w2" not in name}, tmp_path / "x")
    (tmp_path / "x").replace(tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"0.mlp.experts.down_proj: expected shape \[3, 128, 192\], found \[2, 128"
    ):
        loaded(empty, mixtral, tmp_path)


@pytest.mark.parametrize(
    "convert, moves_rows, reason",
    [
        (lambda held: {"c.weight": torch.cat(held, dim=1)}, True, "takes rows of a.weight apart"),
        (lambda held: {"c.weight": torch.cat(held) + 1}, False, "takes rows of a.weight apart"),
        (lambda held: {"c.weight": torch.stack(held).view(3, -1)}, True, "cannot be put together: .*size"),
    ],
    ids=["along-rows", "not-by-rows", "an-error"],
)
def test_what_takes_rows_apart_is_refused(tmp_path, convert, moves_rows, reason):
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in "abz"})
    model = load_and_quantize_model(model, None, QuantizationConfig("nf4"), "cpu")
    torch.save(model.state_dict(), tmp_path / "model.bin")
    stack = Stack(names=("a.weight", "b.weight"), convert=convert, moves_rows=moves_rows)
    with pytest.raises(CheckpointError, match=reason):
        stack_conversions(Checkpoint.open(tmp_path / "model.bin"), [stack])


def test_rows_that_are_split_between_modules(tmp_path):
    def linears(**rows):
        return nn.ModuleDict({name: nn.Linear(64, n, bias=False) for name, n in rows.items()})

    fused = load_and_quantize_model(linears(a=192), None, QuantizationConfig(NF4(double_quant=True)), "cpu")
    torch.save(fused.state_dict(), tmp_path / "model.bin")
    source = Checkpoint.open(tmp_path / "model.bin")
    names = tuple(f"{name}.weight" for name in "qkv")
    stack = Stack(
        names=("a.weight",),
        convert=lambda held: dict(zip(names, held[0].chunk(3), strict=True)),
        moves_rows=True,
    )
    conversions, dropped = stack_conversions(source, [stack])
    made = Renamed(Converted(source, conversions), dropped)
    save_file({name: t.clone() for name, t in made.read(list(made.tensors))}, tmp_path / "split.safetensors")
    model = load_and_quantize_model(linears(q=64, k=64, v=64), tmp_path / "split.safetensors", None, "cpu")
    rows = torch.cat([linear.weight.dequantize() for linear in model.values()])
    assert torch.equal(rows, fused["a"].weight.dequantize())


def test_from_pretrained_reads_them_as_well(empty, tmp_path, monkeypatch):
    import bigq.integrations.transformers

    mapping = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING  # as `use_as_bitsandbytes` does it, for this test
    monkeypatch.setitem(mapping, "bitsandbytes_4bit", bigq.integrations.transformers.LoadingQuantizer)
    saved_by_them(qwen(), tmp_path, in_linears(KINDS["double"]))
    config = json.loads((tmp_path / "config.json").read_text())
    said = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = loaded(empty, qwen, tmp_path).state_dict()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_a_gpu_holds_the_same_numbers(empty, tmp_path, kind):
    saved_by_them(mixtral(), tmp_path, in_linears(KINDS[kind]))
    expected = loaded(empty, mixtral, tmp_path)
    model = empty(mixtral)
    model.tie_weights()
    model = load_and_quantize_model(model, tmp_path, None, 0, progress=False)
    state = model.state_dict()
    assert [name for name, own in expected.state_dict().items() if not torch.equal(own, state[name].cpu())] == []
    experts, plain = model.model.layers[0].mlp.experts, expected.model.layers[0].mlp.experts
    assert torch.equal(experts.gate_up_proj.dequantize().cpu(), plain.gate_up_proj.dequantize())
    assert model(torch.arange(5, device="cuda")[None]).logits.isfinite().all()
