"""Tiny models of diffusers with random weights, what they compute, and comparing their tensors."""

import json

import diffusers
import torch

from bigq import QuantizationConfig


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def vae():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        sample_size=16,
    )


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )


def run(model):
    torch.manual_seed(1)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    device = "cpu" if model.device.type == "meta" else model.device  # accelerate's hooks put parameters there
    inputs = {
        "UNet2DConditionModel": {"sample": latents, "timestep": torch.tensor(3), "encoder_hidden_states": text},
        "AutoencoderKL": {"sample": torch.randn(1, 3, 16, 16)},
        "DiTTransformer2DModel": {
            "hidden_states": latents,
            "timestep": torch.tensor([3]),
            "class_labels": torch.tensor([1]),
        },
        "FluxTransformer2DModel": {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": text,
            "pooled_projections": torch.randn(1, 32),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    }[type(model).__name__]
    with torch.no_grad():
        return model(**{key: value.to(device) for key, value in inputs.items()}).sample.cpu()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def kind_of(path):
    """The class of the model in a folder."""
    return getattr(diffusers, json.loads((path / "config.json").read_text())["_class_name"])


def load(path, format_name=None, **settings):
    """The model in a folder, quantized to a format if one is named."""
    if format_name is not None:
        offload = settings.pop("offload", None)
        settings["quantization_config"] = QuantizationConfig(format_name, offload=offload)
    return kind_of(path).from_pretrained(path, **settings)
