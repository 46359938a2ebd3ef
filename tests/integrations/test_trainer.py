"""transformers' Trainer on quantized models with adapters, and what prepares them for it."""

import pytest
import torch

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from adapted import SIX_STEPS, distance, logits, moved, quantized, state, tuned  # noqa: E402  # it imports peft
from tuners import IDS, llama, lora  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # by transformers
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


def train(model, folder, **settings):
    """The losses of six steps."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{**SIX_STEPS, **settings},
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=ROWS * 8)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "lion_8bit"])
def test_the_trainer_trains_adapters_with_the_optimizers_of_torch_and_bitsandbytes(optimizer, weight_format, tmp_path):
    if optimizer != "adamw_torch":
        pytest.importorskip("bitsandbytes")
    model = peft.prepare_model_for_kbit_training(
        quantized(weight_format), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    before = state(model)
    model = peft.get_peft_model(model, lora(r=64))  # bitsandbytes keeps 8-bit state from 4096 elements on
    losses = train(model, tmp_path, optim=optimizer)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_optimizers(optimizer, weight_format, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = load_and_quantize_model(llama(hidden_size=512), None, QuantizationConfig(weight_format), 0)
    model = peft.get_peft_model(base, lora(r=256))  # paged from 1e5 elements on
    losses = train(model, tmp_path, optim=optimizer, use_cpu=False)
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_is_resumed(weight_format, tmp_path):
    def run(folder, **settings):
        torch.manual_seed(0)
        model = tuned(quantized(weight_format), lora())
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[],
            per_device_train_batch_size=2, disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        transformers.Trainer(model=model, args=arguments, train_dataset=ROWS * 4).train(**settings)
        return logits(model)

    whole = run("whole")
    assert distance(run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")), whole) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, dtype, weight_format):
    base = load_and_quantize_model(llama().to(dtype), None, QuantizationConfig(weight_format), "cpu")
    model = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    model = moved(tuned(model, lora())).train()
    gradients = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
        model.gradient_checkpointing_disable()
    budget = 1e-5 if dtype == torch.float32 else 1e-2
    for name, checkpointed in gradients[0].items():
        assert checkpointed.any()
        assert distance(checkpointed, gradients[1][name]) < budget, name
