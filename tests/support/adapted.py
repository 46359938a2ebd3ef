"""A tiny quantized Llama with an adapter of PEFT, and its twin: the same adapter on the float weights."""

import itertools

import peft
import torch

from bigq import QuantizationConfig, load_and_quantize_model
from dequantized import dequantized
from tuners import inputs, llama

SIX_STEPS = {  # arguments of transformers' and TRL's trainers
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


def quantized(weight_format):
    return load_and_quantize_model(llama(), None, QuantizationConfig(weight_format), "cpu")


def tuned(model, config):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def moved(model, by=0.02):
    """`model` with random numbers added to what is trained: many tuners start where they change nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def float_twin(model, config, weight_format):
    """The adapter of `model`, made by `config`, on the float weights that the quantized ones stand for."""
    twin = tuned(dequantized(quantized(weight_format), llama()), config)
    own = _tensors(twin)
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            if name in own:
                own[name].copy_(tensor)
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= own.keys()
    return twin


def _tensors(model):
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def run(model, name, **labels):
    torch.manual_seed(2)  # some tuners draw random numbers
    return model(**inputs(name), **labels)


@torch.no_grad()
def logits(model, name="lora"):
    return run(model.eval(), name).logits


def distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def state(model):
    """A copy of all tensors of the quantized weights, by their names without those of the adapters around them."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.endswith(("_packed", "_absmax", "quant_state"))
    }
