"""diffusers: its folders, `from_pretrained` with bigq's config, saving, pipelines, and what is refused."""

import json
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn

import bigq
from bigq import QuantizationConfig, QuantizedLinear, QuantizedModule
from bigq.errors import CheckpointError, PlacementError, UnsupportedError

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import bigq.integrations.diffusers  # noqa: E402 - it needs diffusers
from diffusion_models import assert_same, dit, flux, kind_of, load, run, state, unet, vae  # noqa: E402 - it needs diffusers

ROOT = Path(__file__).parents[2]
FORMATS = ["nf4", "int8"]


MODELS = {"unet": (unet, 50), "vae": (vae, 8), "flux": (flux, 27), "dit": (dit, 19)}  # how many weights are quantized
each_model = pytest.mark.parametrize("name", MODELS)
each_format = pytest.mark.parametrize("format_name", FORMATS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a folder with that model, in shards}."""
    paths = {}
    for name, (build, _) in MODELS.items():
        torch.manual_seed(0)
        paths[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(paths[name], max_shard_size="200KB" if name == "unet" else "60KB")
        assert (paths[name] / "diffusion_pytorch_model.safetensors.index.json").exists()
    return paths


def skeleton(path):
    kind = kind_of(path)
    with init_empty_weights():
        return kind.from_config(kind.load_config(path)).eval()


@each_format
@each_model
def test_a_skeleton_is_filled_from_a_folder(folders, name, format_name):
    model = bigq.load_and_quantize_model(skeleton(folders[name]), folders[name], QuantizationConfig(format_name), "cpu")
    plain = kind_of(folders[name]).from_pretrained(folders[name])
    quantized = [path for path, module in model.named_modules() if isinstance(module, QuantizedModule)]
    assert len(quantized) == MODELS[name][1]
    assert not any(isinstance(plain.get_submodule(path), nn.Conv2d) for path in quantized)
    assert model.num_parameters() == plain.num_parameters()
    found = run(model)
    expected = run(bigq.dequantize(model))
    assert (found - expected).norm() <= (0.02 if format_name == "int8" else 1e-5) * expected.norm()


@each_format
@each_model
def test_from_pretrained_has_the_bits_of_a_load_of_ours(folders, tmp_path, name, format_name):
    ours = bigq.load_and_quantize_model(skeleton(folders[name]), folders[name], QuantizationConfig(format_name), "cpu")
    model, info = load(folders[name], format_name, output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert_same(state(model), state(ours))
    assert torch.equal(run(model), run(ours))
    assert not model.training
    assert model.is_quantized
    kind_of(folders[name]).from_pretrained(folders[name]).save_pretrained(tmp_path)  # one file
    assert_same(state(load(tmp_path, format_name)), state(ours))


@each_format
@each_model
@pytest.mark.parametrize("of", ["from_pretrained", "load_and_quantize_model"])
def test_it_saves_what_it_loads(folders, tmp_path, name, format_name, of):
    if of == "from_pretrained":
        model = load(folders[name], format_name)
    else:
        model = bigq.load_and_quantize_model(MODELS[name][0]().eval(), None, QuantizationConfig(format_name), "cpu")
    expected, before = run(model), state(model)
    for step, size in enumerate(("1GB", "20KB", "1GB")):
        model.save_pretrained(tmp_path / str(step), max_shard_size=size)
        saved = json.loads((tmp_path / str(step) / "config.json").read_text())["quantization_config"]
        assert QuantizationConfig.from_dict(saved) == model.config.quantization_config
        model = load(tmp_path / str(step))
        assert_same(state(model), before)
        assert torch.equal(run(model), expected)
        ours = bigq.load_and_quantize_model(skeleton(tmp_path / str(step)), tmp_path / str(step), device_map="cpu")
        assert_same(state(ours), before)


@pytest.mark.parametrize("torch_dtype", [None, torch.bfloat16], ids=["no-dtype", "bfloat16"])
def test_the_dtype_is_the_one_of_a_plain_load(tmp_path, torch_dtype):
    flux().half().save_pretrained(tmp_path)
    plain = load(tmp_path, torch_dtype=torch_dtype)
    model = load(tmp_path, "nf4", torch_dtype=torch_dtype)
    assert model.dtype == plain.dtype == (torch_dtype or torch.float32)
    assert model.x_embedder.weight.dtype == plain.dtype
    assert model.config.quantization_config == QuantizationConfig("nf4", dtype=plain.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_saved_model_keeps_its_dtype(folders, tmp_path, dtype):
    model = load(folders["flux"], "nf4", torch_dtype=dtype)
    model.save_pretrained(tmp_path)
    for settings in ({}, {"torch_dtype": dtype}):
        again = load(tmp_path, **settings)
        assert_same(state(again), state(model))
        assert again.config.quantization_config.dtype == dtype
    with pytest.raises(UnsupportedError, match=rf"saved with {dtype}, and torch_dtype is torch\.float16"):
        load(tmp_path, torch_dtype=torch.float16)


def test_a_convolution_is_quantized_where_it_is_named(folders):
    config = QuantizationConfig("nf4", also_quantize=["conv_in"])
    model = diffusers.UNet2DConditionModel.from_pretrained(folders["unet"], quantization_config=config)
    assert isinstance(model.conv_in, QuantizedModule)
    assert isinstance(model.conv_in, nn.Conv2d)
    found = run(model)
    expected = run(model.dequantize())
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dequantize", [bigq.dequantize, lambda model: model.dequantize()], ids=["ours", "theirs"])
def test_dequantize_gives_the_plain_model_back(folders, tmp_path, dequantize):
    model = load(folders["dit"], "nf4")
    decoded = {path: m.dequantize() for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    plain = dequantize(model)
    assert not plain.is_quantized
    assert not any(isinstance(module, QuantizedModule) for module in plain.modules())
    assert all(torch.equal(plain.get_submodule(path).weight, weight) for path, weight in decoded.items())
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(state(load(tmp_path)), state(plain))


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies_compute_the_same(folders, copied):
    model = load(folders["dit"], "nf4")
    assert torch.equal(run(copied(model)), run(model))


DEVICE_MAPS = {
    "cpu": "cpu",
    "device": torch.device("cpu"),
    "auto": "auto",
    "dict": {"": "cpu"},
    "disk": {"": "disk"},
    "some-on-disk": {"": "cpu", "up_blocks": "disk", "mid_block": "disk"},
}


@each_format
@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS)
def test_device_maps(folders, tmp_path, device_map, format_name):
    model = load(
        folders["unet"], format_name, offload="quantized", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    expected = load(folders["unet"], format_name)
    assert torch.equal(run(model), run(expected))
    if isinstance(device_map, dict) and "disk" in device_map.values():
        assert model.hf_device_map == device_map
        with pytest.raises(PlacementError, match="would undo its device map"):
            model.to("cpu")
    else:
        assert not hasattr(model, "hf_device_map")
        assert model.to("cpu") is model
    model.save_pretrained(tmp_path / "saved")
    assert_same(state(load(tmp_path / "saved")), state(expected))


def test_an_automatic_map_keeps_to_its_limits(folders, tmp_path):
    model = load(folders["unet"], "nf4", device_map="auto", max_memory={"cpu": 1_500_000}, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(run(model), run(load(folders["unet"], "nf4")))


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu", "decoder": "disk"}], ids=["all", "decoder"])
def test_other_methods_of_an_offloaded_autoencoder(folders, device_map):
    resident = load(folders["vae"], "nf4")
    model = load(folders["vae"], "nf4", device_map=device_map, offload="quantized")
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        latents = resident.encode(image).latent_dist.mean
        assert torch.equal(model.encode(image).latent_dist.mean, latents)
        assert torch.equal(model.decode(latents).sample, resident.decode(latents).sample)
        for each in (model, resident):
            each.enable_tiling()
        large = torch.randn(1, 4, 16, 16)
        assert torch.equal(model.decode(large).sample, resident.decode(large).sample)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_other_methods_of_an_autoencoder_offloaded_from_a_gpu(folders, place):
    resident = load(folders["vae"], "nf4", device_map=0)
    model = load(folders["vae"], "nf4", device_map={"": 0, "encoder": place, "decoder": place}, offload="quantized")
    image = torch.randn(1, 3, 16, 16, device=0)
    with torch.no_grad():
        latents = resident.encode(image).latent_dist.mean
        assert torch.equal(model.encode(image).latent_dist.mean, latents)
        assert torch.equal(model.decode(latents).sample, resident.decode(latents).sample)
        with pytest.raises(RuntimeError, match=r"same device|should be the same"):  # no hook brings these inputs in
            model.decode(latents.cpu())


def test_old_names_of_attention_are_found(tmp_path):
    """Autoencoders on the Hub have them: the files were saved before diffusers renamed the modules."""
    vae().save_pretrained(tmp_path)
    expected = state(load(tmp_path, "nf4"))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t for key, t in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, file)
    assert_same(state(load(tmp_path, "nf4")), expected)
    ours = bigq.load_and_quantize_model(skeleton(tmp_path), tmp_path, QuantizationConfig("nf4"), "cpu")
    assert_same(state(ours), expected)


def test_what_the_files_lack_is_an_error_and_what_they_hold_in_addition_is_reported(tmp_path, caplog):
    flux().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "extra": torch.zeros(2)}, file)
    _, info = load(tmp_path, "nf4", output_loading_info=True)
    assert info["unexpected_keys"] == ["extra"]
    save_file({name: t for name, t in tensors.items() if name != "x_embedder.weight"}, file)
    with pytest.raises(CheckpointError, match=r"x_embedder\.weight"):
        load(tmp_path, "nf4")
    save_file({**tensors, "x_embedder.weight": torch.zeros(8, 4)}, file)
    with pytest.raises(CheckpointError, match=r"x_embedder\.weight.*expected shape \[32, 4\], found \[8, 4\]"):
        load(tmp_path, "nf4")


@pytest.mark.parametrize("saved", [{"safe_serialization": False}, {"variant": "fp16"}], ids=["pickle", "variant"])
def test_other_files_of_a_folder(folders, tmp_path, saved):
    load(folders["dit"]).save_pretrained(tmp_path, **saved)
    settings = {"variant": saved["variant"]} if "variant" in saved else {"use_safetensors": False}
    assert_same(state(load(tmp_path, "nf4", **settings)), state(load(folders["dit"], "nf4")))


@each_format
def test_an_adapter_trains(folders, format_name):
    peft = pytest.importorskip("peft")
    model = load(folders["unet"], format_name)
    before = state(model)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert len(trained) == 32  # two factors of two linears, in eight attentions
    model(torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 32)).sample.square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in trained.values())
    after = {name.replace("base_layer.", ""): tensor for name, tensor in state(model).items() if "lora_" not in name}
    assert_same(after, before)


def test_from_single_file_is_refused(folders, tmp_path):
    unet().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="from_single_file cannot quantize"):
        diffusers.UNet2DConditionModel.from_single_file(
            str(tmp_path / "diffusion_pytorch_model.safetensors"),
            config=str(tmp_path),
            quantization_config=QuantizationConfig("nf4"),
        )


def test_another_diffusers_is_refused(folders, monkeypatch):
    monkeypatch.setattr(bigq.integrations.diffusers, "_ORIGINAL", None)
    with pytest.raises(UnsupportedError, match=f"diffusers {diffusers.__version__} does not load as 0.42 does"):
        load(folders["dit"], "nf4")


def test_other_loads_of_diffusers_are_left_alone(folders):
    torch.manual_seed(0)
    assert_same(state(load(folders["unet"])), state(unet()))


def test_without_bigq_a_saved_folder_is_refused(folders, tmp_path, monkeypatch):
    load(folders["dit"], "nf4").save_pretrained(tmp_path)
    for mapping in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        monkeypatch.delitem(getattr(diffusers.quantizers.auto, mapping), "bigq")
    with pytest.raises(ValueError, match="Unknown quantization type, got bigq"):
        load(tmp_path)


def test_the_config_alone_registers_bigq(folders):
    code = f"""
import sys
import bigq
assert "diffusers" not in sys.modules
from diffusers import DiTTransformer2DModel
config = bigq.QuantizationConfig("nf4")
model = DiTTransformer2DModel.from_pretrained({str(folders["dit"])!r}, quantization_config=config)
assert isinstance(model.transformer_blocks[0].attn1.to_q, bigq.QuantizedLinear)
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'triton_kernels'}", "PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


def test_a_transformers_that_is_too_old_refuses_only_its_own_loads(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bigq.integrations.transformers", None)  # to import it is an ImportError
    config = QuantizationConfig("nf4")
    model = diffusers.UNet2DConditionModel.from_pretrained(folders["unet"], quantization_config=config)
    assert model.quantization_method == config.quant_method == "bigq"
    with pytest.raises(ImportError, match=r"bigq\.integrations\.transformers"):
        transformers.quantizers.AutoHfQuantizer.from_config(config)
