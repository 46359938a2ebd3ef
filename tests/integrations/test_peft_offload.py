"""Adapters of PEFT on offloaded blocks."""

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from adapted import distance, logits, moved, quantized, state, tuned  # noqa: E402  # it imports peft
from tuners import IDS, llama, lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
EVERYWHERE = ["q_proj", "down_proj", "lm_head", "embed_tokens"]


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


@pytest.fixture
def offloaded(tmp_path, weight_format):
    """offloaded(device_map): the model of `quantized`, parts of which are stored on the CPU or the disk."""
    save_file(llama().state_dict(), tmp_path / "model.safetensors")

    def load(device_map, offload="quantized"):
        with init_empty_weights():
            skeleton = llama()
        return load_and_quantize_model(
            skeleton,
            tmp_path / "model.safetensors",
            QuantizationConfig(weight_format),
            device_map,
            offload=offload,
            offload_folder=tmp_path / "offload",
        )

    return load


def gradients(model):
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_on_a_block_on_the_disk(offloaded, weight_format, tmp_path):
    device_map = {"": "cpu", "model.layers.1": "disk"}
    model = moved(tuned(offloaded(device_map), lora()))
    resident = tuned(quantized(weight_format), lora())
    peft.set_peft_model_state_dict(resident, peft.get_peft_model_state_dict(model))
    expected = logits(resident)
    assert torch.equal(logits(model), expected)
    found = gradients(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients(resident).items())

    before = state(model)
    model.merge_adapter()
    resident.merge_adapter()
    assert torch.equal(logits(model), logits(resident))
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())

    model.save_pretrained(tmp_path / "adapter")
    again = peft.get_peft_model(offloaded(device_map), peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    peft.set_peft_model_state_dict(again, peft.load_peft_weights(tmp_path / "adapter", device="cpu"))
    assert torch.equal(logits(again), expected)
    assert "bigq" in type(again.base_model.model._hf_hook).__module__, "the hooks are bigq's"


def test_from_pretrained_gives_the_same_outputs_with_hooks_of_accelerate(offloaded, tmp_path):
    device_map = {"": "cpu", "model.layers.1": "disk"}
    model = moved(tuned(offloaded(device_map), lora()))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(offloaded(device_map), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert "accelerate" in type(again.base_model.model._hf_hook).__module__


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["quantized", "preserve"])
@pytest.mark.parametrize("stored", ["cpu", "disk"])
def test_an_adapter_on_an_offloaded_block_runs_on_the_gpu(stored, offload, offloaded):
    model = offloaded({"": 0, "model.layers.1": stored, "lm_head": stored}, offload)
    plain = model(input_ids=IDS.cuda()).logits.detach()
    model = moved(tuned(model, lora(target_modules=EVERYWHERE)))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)  # made before the first call, which moves what it holds
    before = {id(p) for p in model.parameters() if not p.requires_grad and not p.is_cuda}
    losses = []
    for _ in range(6):
        loss = model.train()(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.is_cuda for p in trainable)
    assert {id(p) for p in model.parameters() if not p.is_cuda} == before != set()
    with model.disable_adapter(), torch.no_grad():
        assert distance(model.eval()(input_ids=IDS.cuda()).logits, plain) < 1e-3
