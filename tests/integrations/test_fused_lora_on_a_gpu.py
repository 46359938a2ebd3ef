"""fuse_lora on a GPU: errors by kernels, their replays and a CUDA graph of both passes."""

import pytest
import torch
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from adapted import distance  # noqa: E402  # it imports peft
from bigq.integrations.fused_lora import fuse_lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def on_gpu(fmt, **settings):
    """A quantized linear [1024, 2048] in bfloat16 with a float32 adapter, and what it computes in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 1024), nn.Identity()).to("cuda", torch.bfloat16)
    model = load_and_quantize_model(model, None, QuantizationConfig(fmt, **settings), 0).requires_grad_(False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=24, target_modules=["0"], init_lora_weights=False)
    )
    module = model.base_model.model[0]
    dense, bias = module.base_layer.dequantize(torch.float32).double(), module.base_layer.bias.double()

    def exact(x, down, up):
        return x @ dense.T + bias + 1.5 * (x @ down.T) @ up.T

    return model, [module.lora_A["default"].weight, module.lora_B["default"].weight], exact


def gradients(call, x, factors, grad):
    leaf = x.detach().clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=x.dtype != torch.float64):
        out = call(leaf)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *factors], grad.to(out.dtype))]


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 300, 2100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt, settings", [("nf4", {}), ("nf4", {"double_quant": True}), ("int8", {})])
def test_on_a_gpu_errors_are_at_most_pefts_also_replayed(fmt, settings, dtype, m):
    model, factors, exact = on_gpu(fmt, **settings)
    x, grad = torch.randn(2, m, 2048, device="cuda").to(dtype), torch.randn(2, m, 1024, device="cuda").bfloat16()
    wide = [factor.detach().double().requires_grad_() for factor in factors]
    expected = gradients(lambda x: exact(x, *wide), x.double(), wide, grad)
    theirs = gradients(model, x, factors, grad)
    fuse_lora(model)
    for _ in range(4):  # run, recorded, replayed
        ours = gradients(model, x, factors, grad)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        for a, b, right in zip(ours, theirs, expected, strict=True):
            assert distance(a.double(), right) <= 1.05 * distance(b.double(), right)


@pytest.mark.gpu
def test_a_cuda_graph_of_both_passes_computes_with_what_its_inputs_hold_when_it_is_replayed():
    model, factors, _ = on_gpu("nf4")
    fuse_lora(model)
    x, grad = torch.randn(64, 2048, device="cuda").bfloat16(), torch.randn(64, 1024, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(model, x, factors, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(model, x, factors, grad)
    for value in (x, grad, *(factor.data for factor in factors)):
        value.copy_(torch.randn_like(value))
    graph.replay()
    for found, expected in zip(captured, gradients(model, x, factors, grad), strict=True):
        assert distance(found.float(), expected.float()) < 4e-3  # one rounding to bfloat16
