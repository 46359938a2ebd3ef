"""Pipelines of diffusers with components that bigq quantized: loading, saving, moving and offloading."""

import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from bigq import NF4, QuantizationConfig, QuantizedLinear, QuantizedModule
from bigq.errors import PlacementError

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import bigq.integrations.diffusers  # noqa: E402, F401 - a pipeline's config needs it

ROOT = Path(__file__).parents[2]
from diffusion_models import assert_same, load, run, state, unet, vae  # noqa: E402 - it needs diffusers


def build():
    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return torch.from_numpy(pipeline("a cat", generator=generator, **settings).images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    build().save_pretrained(path)
    return path


def quantized(folder, **settings):
    mapping = {"unet": QuantizationConfig("nf4"), "text_encoder": QuantizationConfig("int8")}
    config = diffusers.PipelineQuantizationConfig(quant_mapping=mapping)
    return diffusers.DiffusionPipeline.from_pretrained(folder, quantization_config=config, **settings)


def test_each_component_has_its_config(folder):
    pipeline = quantized(folder)
    formats = {
        name: {
            stored.format.name
            for m in model.modules()
            if isinstance(m, QuantizedModule)
            for stored in m.descriptions.values()
        }
        for name, model in pipeline.components.items()
        if isinstance(model, nn.Module)
    }
    assert formats == {"vae": set(), "unet": {"nf4"}, "text_encoder": {"int8"}}
    assert_same(state(pipeline.unet), state(load(folder / "unet", "nf4")))
    image = draw(pipeline)
    pipeline.unet.dequantize()
    pipeline.text_encoder.dequantize()
    assert (image - draw(pipeline)).abs().max() < 0.01


def test_it_saves_and_loads_again(folder, tmp_path):
    pipeline = quantized(folder)
    image = draw(pipeline)
    for step in ("one", "two"):
        pipeline.save_pretrained(tmp_path / step)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / step)
        assert torch.equal(draw(pipeline), image)


def test_one_config_for_components_of_both_libraries(folder):
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="bigq",
        quant_kwargs={"format": "nf4", "block_size": 32},
        components_to_quantize=["unet", "text_encoder"],
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, quantization_config=config)
    for model in (pipeline.unet, pipeline.text_encoder):
        formats = {m.format for m in model.modules() if isinstance(m, QuantizedLinear)}
        assert formats == {NF4(block_size=32)}
    assert not any(isinstance(module, QuantizedModule) for module in pipeline.vae.modules())


@pytest.mark.slow
def test_it_loads_again_in_another_process(folder, tmp_path):
    """The import for diffusers does for the text encoder too, which is a model of transformers."""
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"text_encoder": QuantizationConfig("nf4")})
    diffusers.DiffusionPipeline.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path)
    code = f"""
import bigq.integrations.diffusers
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
assert pipeline.text_encoder.is_quantized
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'triton_kernels'}", "PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


@pytest.mark.parametrize("device_map", ["balanced", "cpu"])
def test_a_device_map(folder, device_map):
    assert torch.equal(draw(quantized(folder, device_map=device_map)), draw(quantized(folder)))


def test_moving_works_and_casting_is_refused(folder):
    pipeline = quantized(folder)
    image = draw(pipeline)
    assert torch.equal(draw(pipeline.to("cpu")), image)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipeline.to(torch.float16)


def test_offloaded_components(folder):
    """A component is loaded on its own, with its own map, and passed to the pipeline."""
    image = draw(quantized(folder))
    places = {"": "cpu", "up_blocks": "disk", "mid_block": "disk"}
    own = load(folder / "unet", "nf4", device_map=places, offload="quantized")
    pipeline = quantized(folder, unet=own)
    assert torch.equal(draw(pipeline), image)
    with pytest.raises(PlacementError, match=r"UNet2DConditionModel\.to\(\) would undo its device map"):
        pipeline.to("cpu")


def test_hooks_of_accelerate_and_groups_of_diffusers(folder):
    expected = run(load(folder / "unet", "nf4"))
    sequential = load(folder / "unet", "nf4")
    cpu_offload(sequential, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(run(sequential), expected)
    for kind in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        groups = load(folder / "unet", "nf4")
        groups.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **kind)
        assert torch.equal(run(groups), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["model", "group"])
def test_offloading_of_the_pipeline(folder, mode, device):
    image = draw(quantized(folder).to(device))
    pipeline = quantized(folder)
    if mode == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(torch.device(device), torch.device("cpu"), offload_type="leaf_level")
    for _ in range(2):
        assert torch.equal(draw(pipeline), image)


@pytest.mark.gpu
def test_components_offloaded_from_a_gpu(folder):
    image = draw(quantized(folder).to("cuda"))
    pipeline = quantized(folder).to("cuda")
    places = {"": 0, "encoder": "cpu", "decoder": "cpu"}
    pipeline.vae = load(folder / "vae", torch_dtype=torch.float32).to("cuda")
    pipeline.unet = load(
        folder / "unet", "nf4", device_map={"": 0, "up_blocks": "cpu", "mid_block": "disk"}, offload="quantized"
    )
    assert torch.equal(draw(pipeline), image)
    pipeline.vae = load(folder / "vae", "nf4", device_map=places, offload="quantized")
    assert pipeline._execution_device == torch.device("cuda:0")
    assert draw(pipeline).isfinite().all()
