"""timm: a vision transformer loads, runs and comes back."""

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from safetensors.torch import save_file
from torch import nn

from bigq import QuantizationConfig, QuantizedLinear, load_and_quantize_model
from bigq import dequantize as dequantized

timm = pytest.importorskip("timm", reason="needs timm, and a torchvision that fits this torch")

SETTINGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


def build():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **SETTINGS).eval()


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
def test_a_vision_transformer_loads_runs_and_comes_back(tmp_path, format_name):
    torch.manual_seed(0)
    (tmp_path / "plain").mkdir()
    save_file(build().state_dict(), tmp_path / "plain" / "model.safetensors")
    image = torch.randn(2, 3, 32, 32)
    with init_empty_weights():
        skeleton = build()
    model = load_and_quantize_model(skeleton, tmp_path / "plain", QuantizationConfig(format_name), "cpu")
    layers = [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 8  # four a block
    assert type(model.head) is nn.Linear
    with torch.no_grad():
        found = model(image)
    Accelerator().save_model(model, tmp_path / "saved")
    with init_empty_weights():
        skeleton = build()
    again = load_and_quantize_model(skeleton, tmp_path / "saved", device_map="cpu")
    with torch.no_grad():
        assert torch.equal(again(image), found)
        expected = dequantized(model)(image)
    assert (found - expected).norm() <= (0.02 if format_name == "int8" else 1e-5) * expected.norm()
