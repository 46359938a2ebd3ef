"""merge_costs: what it says of a merge is what the merge then does."""

import pytest
import torch
from torch import nn

from bigq import NF4, BigqError, Int8, QuantizationConfig, QuantizedModule, load_and_quantize_model

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from adapted import distance, float_twin, moved, quantized, state, tuned  # noqa: E402  # it imports peft
from bigq.integrations.peft import MergeCost, merge_costs  # noqa: E402
from tuners import LORAS, OTHERS, lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(params=[NF4(), Int8()], ids=["nf4", "int8"])
def weight_format(request):
    return request.param


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "loha", "oft", "vera", "miss_bat"])
def test_the_costs_are_those_of_the_merge(name, weight_format):
    config = (LORAS | OTHERS)[name]
    model = moved(tuned(quantized(weight_format), config()), by=0.1)
    twin = float_twin(model, config(), weight_format)
    before = state(model)
    costs = merge_costs(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    adapted = {path for path, module in model.named_modules() if hasattr(module, "base_layer")}
    assert costs.keys() == adapted
    for path, cost in costs.items():
        base, weight = model.get_submodule(path).base_layer, twin.get_submodule(path).base_layer.weight
        old = weight.detach().clone()
        twin.get_submodule(path).merge()
        model.get_submodule(path).merge()
        assert cost.change == pytest.approx(distance(weight.detach(), old), rel=1e-4)
        if (name, weight_format) != ("oft", Int8()):  # OFT multiplies by the weight, in which int8 rounds too
            assert cost.rounding == pytest.approx(
                (base.dequantize() - weight).norm().item() / old.norm().item(), rel=1e-3
            )


def test_rounding_drowns_a_small_adapter(weight_format):
    model = moved(tuned(quantized(weight_format), lora()), by=1e-3)
    assert all(cost.change < cost.rounding for cost in merge_costs(model).values())


def test_an_adapter_that_changes_nothing_rounds_nothing(weight_format):
    costs = merge_costs(tuned(quantized(weight_format), lora()))
    assert set(costs.values()) == {MergeCost(change=0.0, rounding=0.0)}


def test_the_named_adapters_are_merged():
    model = tuned(quantized(NF4()), lora())
    model.add_adapter("second", lora(init_lora_weights=False))
    assert all(cost.change == 0 for cost in merge_costs(model, ["default"]).values())
    assert all(cost.change > 0 for cost in merge_costs(model, ["default", "second"]).values())


def test_conv1d_and_embedding():
    transformers = pytest.importorskip("transformers")

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(32, 64)
            self.mix = transformers.pytorch_utils.Conv1D(48, 64)

    config = QuantizationConfig("nf4", also_quantize=["words", "mix"])
    base = load_and_quantize_model(Words(), None, config, "cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["words", "mix"], fan_in_fan_out=True))
    moved(model, by=0.1)
    costs = merge_costs(model)
    assert all(0 < cost.rounding < 0.2 for cost in costs.values())
    assert {path.rpartition(".")[2] for path in costs} == {"words", "mix"}
    assert all(isinstance(model.get_submodule(path).base_layer, QuantizedModule) for path in costs)


def test_refusals():
    model = moved(tuned(quantized(NF4()), lora()))
    model.merge_adapter()
    with pytest.raises(BigqError, match=r"q_proj is merged already: call the model's unmerge_adapter\(\) first"):
        merge_costs(model)
    with pytest.raises(BigqError, match="LlamaForCausalLM has no adapter on a quantized module"):
        merge_costs(quantized(NF4()))
