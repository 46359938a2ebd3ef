"""Expert parallelism: processes that hold some experts each compute what one process computes."""

from importlib import import_module

import pytest
import torch
from torch import nn

from bigq import NF4, Int8, QuantizationConfig, UnsupportedError, load_and_quantize_model
from ranks import error_of, mesh_of, own_device, run_ranks

pytest.importorskip("transformers")
FORMATS = {
    "nf4": NF4(),
    "nf4-double-quant": NF4(double_quant=True),
    "int8": Int8(threshold=0.0),  # with outlier columns, a row's product depends on the rows beside it
}
CLASSES = {  # module, class and config of transformers
    "gpt-oss": ("gpt_oss", "GptOssExperts", "GptOssConfig"),  # transposed, interleaved, with biases
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig"),
}
IMPLEMENTATIONS = ("grouped_mm", "eager")
WORLD, E, TOP_K, H, INNER = 2, 5, 2, 64, 96
TOKENS = (1, 30)  # rows that are multiplied as they come, and rows that are sorted by expert


def experts_of(name, weight_format, implementation):
    module, kind, config = CLASSES[name]
    config = getattr(import_module(f"transformers.models.{module}.configuration_{module}"), config)(
        hidden_size=H, intermediate_size=INNER, moe_intermediate_size=INNER, num_local_experts=E, num_experts=E
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), kind)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = nn.Sequential(experts)
    return load_and_quantize_model(model, None, QuantizationConfig(weight_format), own_device())[0]


def run(experts, tokens):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, H, generator=generator).to(own_device()).requires_grad_()
    ids = torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in range(tokens)]).to(own_device())
    weights = torch.rand(tokens, TOP_K, generator=generator).to(own_device()).requires_grad_()
    out = experts(x, ids, weights)
    out.square().mean().backward()
    with torch.no_grad():
        again = experts(x, ids, weights)
    return out.detach(), x.grad, weights.grad, again


def _compare(rank):
    from bigq.integrations.expert_parallel import ExpertParallel
    from bigq.integrations.tensor_parallel import parallelize_module

    mesh, found = mesh_of(WORLD), {}
    for name in CLASSES:
        for format_name, weight_format in FORMATS.items():
            for implementation in IMPLEMENTATIONS:
                one, several = (experts_of(name, weight_format, implementation) for _ in range(2))
                parallelize_module(several, mesh, ExpertParallel())
                errors = [
                    max(
                        ((a - b).norm() / b.norm()).item()
                        for a, b in zip(run(several, tokens), run(one, tokens), strict=True)
                    )
                    for tokens in TOKENS
                ]
                found[f"{name}-{format_name}-{implementation}"] = errors, several.num_experts
    found["llama4"] = {name: _of_all_rows(own, mesh) for name, own in FORMATS.items()}
    found["refused"] = _refused(mesh)
    found["adapters"] = [_adapted(name, mesh) for name in CLASSES]
    try:
        parallelize_module(nn.Sequential(several), mesh, {"0": ExpertParallel()})
    except UnsupportedError as refusal:
        found["twice"] = str(refusal)
    return found


def llama4_experts(weight_format):
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    torch.manual_seed(0)
    experts = Llama4TextExperts(Llama4TextConfig(hidden_size=H, intermediate_size=INNER, num_local_experts=E))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = nn.ModuleDict({"experts": experts})
    return load_and_quantize_model(model, None, QuantizationConfig(weight_format), own_device())["experts"]


def _of_all_rows(weight_format, mesh):
    """What outputs and gradients differ by of experts that take the rows of each expert."""
    from bigq.integrations.expert_parallel import ExpertParallel
    from bigq.integrations.tensor_parallel import parallelize_module

    one, several, errors = llama4_experts(weight_format), llama4_experts(weight_format), []
    parallelize_module(several, mesh, ExpertParallel())
    for tokens in TOKENS:
        results = []
        for experts in (several, one):
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(E * tokens, H, generator=generator).to(own_device()).requires_grad_()
            out = experts(x)
            out.square().mean().backward()
            with torch.no_grad():
                results.append((out.detach(), x.grad, experts(hidden_states=x)))
        errors += [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
    return max(errors), several.num_experts


def _refused(mesh):
    """What is said of experts with another forward, and of those of Llama4 with an adapter."""
    import peft

    from bigq.integrations.expert_parallel import ExpertParallel
    from bigq.integrations.tensor_parallel import parallelize_module
    from mixtures import mixture

    model = load_and_quantize_model(mixture("LongcatFlashForCausalLM"), None, QuantizationConfig("nf4"), own_device())
    layer = nn.ModuleDict({"experts": llama4_experts(NF4())})
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj"])
    adapted = peft.inject_adapter_in_model(config, layer)["experts"]
    return [
        error_of(lambda module=module: parallelize_module(module, mesh, ExpertParallel()))
        for module in (model.model.layers[0].mlp.experts, adapted, nn.Linear(2, 2))
    ]


def _adapted(name, mesh):
    """What outputs and gradients of LoRA on experts differ by, with few rows and with many."""
    import peft

    from bigq.integrations.expert_parallel import ExpertParallel
    from bigq.integrations.tensor_parallel import parallelize_module

    models = []
    for _ in range(2):
        model = nn.ModuleDict({"experts": experts_of(name, NF4(), "grouped_mm")})
        torch.manual_seed(2 if models else 2 + mesh.get_local_rank())  # the processes draw other numbers
        settings = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
        adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, init_lora_weights=False, **settings), model)
        models.append(adapted["experts"])
    several, one = models
    parallelize_module(several, mesh, ExpertParallel())
    for ours, theirs in zip(several.parameters(), one.parameters(), strict=True):
        if ours.requires_grad:
            theirs.data.copy_(ours.full_tensor())
    errors = []
    for tokens in TOKENS:
        for model in models:
            model.zero_grad()
        pairs = list(zip(run(several, tokens), run(one, tokens), strict=True))
        trained = zip(several.parameters(), one.parameters(), strict=True)
        pairs += [(ours.grad.full_tensor(), theirs.grad) for ours, theirs in trained if ours.requires_grad]
        errors += [((a - b).norm() / b.norm().clamp_min(1e-20)).item() for a, b in pairs]
    return max(errors), len(pairs)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return run_ranks(_compare, tmp_path_factory.mktemp("expert-parallel"), world=WORLD, gpus=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_and_gradients_are_those_of_one_process(compared, name, weight_format, implementation):
    """In float32, with 5 experts for 2 processes: the outputs of a token's experts are added in another order."""
    assert [found[f"{name}-{weight_format}-{implementation}"][1] for found in compared] == [2, 3]
    for found in compared:
        assert max(found[f"{name}-{weight_format}-{implementation}"][0]) < 1e-6


def test_adapters_of_experts_have_the_gradients_of_one_process(compared):
    for found in compared:
        for off, pairs in found["adapters"]:
            assert off < 1e-6
            assert pairs == 4 + 4  # two factors of each weight


@pytest.mark.parametrize("weight_format", FORMATS)
def test_experts_that_take_the_rows_of_each_are_those_of_one_process(compared, weight_format):
    assert [found["llama4"][weight_format][1] for found in compared] == [2, 3]
    assert all(found["llama4"][weight_format][0] < 1e-6 for found in compared)


def test_other_experts_are_refused_by_their_class(compared):
    for found in compared:
        other, adapted, linear = found["refused"]
        assert "cannot cut a LongcatFlashExperts: its forward is not that of most fused experts" in other
        assert "cannot cut the experts of a Llama4TextExperts with adapters" in adapted
        assert "is for fused experts with quantized weights, and this is a Linear" in linear


def test_experts_are_cut_once(compared):
    for found in compared:
        assert "parallelized already" in found["twice"]
