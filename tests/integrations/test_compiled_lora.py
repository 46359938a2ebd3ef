"""QLoRA with compiled blocks: one graph for all blocks of a model, without breaks, with the gradients of eager mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bigq import QuantizationConfig, load_and_quantize_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from adapted import moved, tuned  # noqa: E402  # it imports peft
from bigq.integrations.fused_lora import fuse_lora  # noqa: E402
from tuners import IDS, llama, lora  # noqa: E402

LAYERS = 10  # more than the 8 graphs that torch compiles for one function
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qlora(format_name):
    """A model in bfloat16 with adapters in float32 on all linears, and gradient checkpointing."""
    base = llama(num_hidden_layers=LAYERS).to(torch.bfloat16)
    base = load_and_quantize_model(base, None, QuantizationConfig(format_name), "cpu").requires_grad_(False)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return moved(tuned(base, lora(target_modules="all-linear")), by=0.02).train()


def step(model):
    """The loss and the gradients of a step as a trainer computes it."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the compiler
@pytest.mark.parametrize("format_name, fused", [("nf4", False), ("nf4", True), ("int8", False)])
def test_all_blocks_share_one_graph_without_a_break(format_name, fused):
    model = qlora(format_name)
    loss, gradients = step(model)
    if fused:
        fuse_lora(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.base_model.model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        found = step(model)
        assert counter.frame_count == 1
        torch.testing.assert_close(found[0], loss, rtol=1e-2, atol=0)
        assert (found[1] - gradients).norm() < 0.02 * gradients.norm()
