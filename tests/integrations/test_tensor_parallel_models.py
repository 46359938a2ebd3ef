"""Tensor parallelism of a Llama with a LoRA adapter, under a plan for the float model; and with FSDP2 on a 2-D mesh."""

from importlib import import_module

import pytest
import torch

from bigq import NF4, Int8, QuantizationConfig, UnsupportedError, load_and_quantize_model
from ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow  # 33 s of CPU time
FORMATS = {"float": None, "nf4-double-quant": NF4(double_quant=True), "int8": Int8()}
IDS = torch.arange(16).view(2, 8) * 7 % 90


def llama(weight_format, dtype):
    import peft
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    if weight_format is not None:
        model = load_and_quantize_model(model, None, QuantizationConfig(weight_format), "cpu")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.to(dtype)


def plan(styles):
    names = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), styles.ColwiseParallel),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), styles.ColwiseParallel),
        **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), styles.RowwiseParallel),
    }
    return {f"base_model.model.model.layers.*.{name}": style() for name, style in names.items()}


def adapter_plan(styles):
    """What torch's own styles need to parallelize a float model with adapters."""
    found = {}
    for name, style in plan(styles).items():
        found[f"{name}.base_layer"] = style
        by_rows = isinstance(style, styles.ColwiseParallel)
        found[f"{name}.lora_B.default" if by_rows else f"{name}.lora_A.default"] = type(style)()
    return found


def step(model, *, clip):
    """The logits, and the gradients of the adapter, whole and clipped; torch cannot clip those of its own plan."""
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    gradients = {
        name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return out.logits.detach(), gradients


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(found, expected):
    (logits, gradients), (other, others) = found, expected
    assert gradients.keys() == others.keys()
    a = torch.cat([gradients[name].flatten() for name in others])
    b = torch.cat([others[name].flatten() for name in others])
    return error(logits, other), error(a, b)


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _compare(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel as torchs

    from bigq.integrations.tensor_parallel import parallelize_module

    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, weight_format in FORMATS.items():
        for dtype in (torch.float32, torch.bfloat16):
            one, several = (llama(weight_format, dtype) for _ in range(2))
            if rank and weight_format is not None:  # processes that were seeded differently
                several.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.data += 1
            layer_plan = adapter_plan(torchs) if weight_format is None else plan(torchs)
            parallelize_module(several, mesh, layer_plan)
            clip = weight_format is not None
            found[f"{name}-{dtype}"] = difference(step(several, clip=clip), step(one, clip=clip))
    with torch.no_grad():
        generated = [model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (one, several)]
        found["tokens"] = torch.equal(*generated)
    found["saved"] = _saved(rank, mesh, folder)
    found["from_pretrained"] = _from_pretrained(rank, folder)
    return found


def _saved(rank, mesh, folder):
    """What a gathered adapter in one process differs by from the parallelized model."""
    import peft
    import torch.distributed as dist
    from torch.distributed.tensor import parallel as torchs

    from bigq.integrations.tensor_parallel import parallelize_module

    several = parallelize_module(llama(NF4(), torch.float32), mesh, plan(torchs))
    state = {name: p.full_tensor() for name, p in several.named_parameters() if p.requires_grad}
    if rank == 0:
        several.save_pretrained(f"{folder}/adapter", state_dict=state)
    dist.barrier()
    one = peft.PeftModel.from_pretrained(llama(NF4(), torch.float32).unload(), f"{folder}/adapter")
    with torch.no_grad():
        return error(several(input_ids=IDS).logits, one(input_ids=IDS).logits)


def _from_pretrained(rank, folder):
    """What models of transformers differ by that are loaded with a DistributedConfig, and what is refused."""
    import torch.distributed as dist
    import transformers
    from transformers.distributed import DistributedConfig

    import_module("bigq.integrations.transformers")  # reads folders that are quantized already

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    moe = {"moe_intermediate_size": 64, "num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 128}
    llama4 = {"intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 5, "head_dim": 32}
    cases = {
        "llama": (
            transformers.LlamaConfig(intermediate_size=256, tie_word_embeddings=True, vocab_size=96, **sizes),
            {},
        ),
        "qwen3-moe-experts": (transformers.Qwen3MoeConfig(vocab_size=96, **moe, **sizes), {"ep_size": 2}),
        "llama4": (
            transformers.Llama4TextConfig(vocab_size=96, **llama4, **sizes),
            {},
        ),
    }
    found, load = {}, transformers.AutoModelForCausalLM.from_pretrained
    for name, (config, settings) in cases.items():
        here = f"{folder}/{name}"
        if rank == 0:
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(here)
            quantization = QuantizationConfig("nf4")
            load(here, quantization_config=quantization, dtype=torch.float32).save_pretrained(f"{here}-quantized")
        dist.barrier()
        distributed = DistributedConfig(tp_size=2, tp_plan="auto", **settings)
        one = load(here, quantization_config=QuantizationConfig("nf4"), dtype=torch.float32)
        models = [
            load(
                here, quantization_config=QuantizationConfig("nf4"), dtype=torch.float32, distributed_config=distributed
            ),
            load(f"{here}-quantized", distributed_config=distributed),
        ]
        with torch.no_grad():
            expected = one(input_ids=IDS).logits
            errors = [error(model(input_ids=IDS).logits, expected) for model in models]
        gradients = [_of_embedded(model) for model in (models[0], one)]
        errors.append(error(*gradients))
        held = [sum(whole_or_local(p).nbytes for p in model.parameters()) for model in (models[0], one)]
        found[name] = errors, held[0] / held[1]
    found["refused"] = []
    import peft

    for attempt in (
        lambda: peft.get_peft_model(models[1], peft.LoraConfig(target_modules=["q_proj"])),
        lambda: models[0].save_pretrained(f"{folder}/slices-{rank}"),
        lambda: load(here, quantization_config=QuantizationConfig("nf4"), distributed_config={"fsdp_size": 2}),
    ):
        try:
            attempt()
        except UnsupportedError as refusal:
            found["refused"].append(str(refusal))
    return found


def _of_embedded(model):
    """The gradient of embedded tokens."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(IDS).detach().clone().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    return embedded.grad


def whole_or_local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _both(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import parallel as torchs

    from bigq.integrations.tensor_parallel import parallelize_module

    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    for name, weight_format in FORMATS.items():
        if weight_format is None:
            continue
        one, several = (llama(weight_format, torch.float32) for _ in range(2))
        parallelize_module(several, mesh["tp"], plan(torchs))
        for block in several.base_model.model.model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(several, mesh=mesh["dp"])
        found[name] = difference(step(several, clip=True), step(one, clip=True))
        optimizer = torch.optim.AdamW([p for p in several.parameters() if p.requires_grad])
        optimizer.step()
    return found


def _mlp_step(mlp):
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = mlp(x)
    out.square().mean().backward()
    return out.detach(), x.grad


def _families(rank, folder):
    """What models of other families differ by that transformers distributes, with and without bigq."""
    import torch.distributed as dist
    import transformers
    from transformers.distributed import DistributedConfig

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    low_rank = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    experts = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    configs = {
        "phi3": transformers.Phi3Config(
            intermediate_size=256, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
        ),
        "gemma2": transformers.Gemma2Config(intermediate_size=256, num_key_value_heads=2, head_dim=32, **sizes),
        "mixtral": transformers.MixtralConfig(
            intermediate_size=128, num_key_value_heads=2, num_local_experts=4, **sizes
        ),
        "deepseek-v3": transformers.DeepseekV3Config(
            intermediate_size=256, moe_intermediate_size=64, num_key_value_heads=4, **experts, **low_rank, **sizes
        ),
    }
    found, auto = {}, transformers.AutoModelForCausalLM
    for name, config in configs.items():
        here = f"{folder}/{name}"
        if rank == 0:
            torch.manual_seed(0)
            auto.from_config(config).save_pretrained(here)
        dist.barrier()
        for quantization in (None, QuantizationConfig("nf4")):
            outs = []
            for distributed in (None, DistributedConfig(tp_size=2, tp_plan="auto")):
                settings = {"quantization_config": quantization, "distributed_config": distributed}
                model = auto.from_pretrained(here, dtype=torch.float32, **{k: v for k, v in settings.items() if v})
                model.requires_grad_(False)
                embedded = model.get_input_embeddings()(IDS).detach().clone().requires_grad_()
                logits = model(inputs_embeds=embedded).logits
                logits.square().mean().backward()
                outs.append((logits.detach(), embedded.grad))
            found[name, quantization is not None] = max(error(b, a) for a, b in zip(*outs, strict=True))
    mlp = model.model.layers[0].mlp
    found["compiled", True] = max(
        error(b, a)
        for a, b in zip(_mlp_step(mlp), _mlp_step(torch.compile(mlp, backend="aot_eager", fullgraph=True)), strict=True)
    )
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor-parallel-models")
    return run_ranks(_compare, folder, str(folder))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float"])
def test_the_plan_of_the_float_model_gives_logits_and_gradients_of_adapters(compared, name):
    """Within what torch's own styles differ for the float model, but for int8, which rounds x by other maxima."""
    for found in compared:
        for dtype in (torch.float32, torch.bfloat16):
            ours, torchs = found[f"{name}-{dtype}"], found[f"float-{dtype}"]
            for mine, theirs in zip(ours, torchs, strict=True):
                assert mine <= (2 * theirs if name != "int8" else 2 * theirs + 2e-2)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe-experts", "llama4"])
def test_from_pretrained_carries_out_the_plan_of_transformers(compared, name):
    """Of a model that it quantizes, and of one that was saved quantized; the embedding is cut, too."""
    for found in compared:
        errors, share = found["from_pretrained"][name]
        assert max(errors) < 1e-5
        assert share < 0.62  # the first process has 2 of 5 experts


def test_what_from_pretrained_cannot_distribute_is_refused(compared):
    for found in compared:
        adapting, saving, sharding = found["from_pretrained"]["refused"]
        assert "add the adapter before parallelize_module" in adapting
        assert "slices of tensor or expert parallelism" in saving
        assert "fsdp_size=2" in sharding


def test_an_adapter_is_gathered_and_saved(compared):
    assert max(found["saved"] for found in compared) < 1e-5


def test_greedy_decoding_gives_the_tokens_of_one_process(compared):
    assert [found["tokens"] for found in compared] == [True, True]


def test_tensor_parallel_blocks_are_sharded_by_fsdp2(tmp_path):
    for found in run_ranks(_both, tmp_path, world=4):
        for name, errors in found.items():
            assert max(errors) < (2e-2 if name == "int8" else 1e-5)


def test_families_of_transformers_are_distributed_as_their_float_models(tmp_path):
    for found in run_ranks(_families, tmp_path, str(tmp_path)):
        for (name, is_quantized), off in found.items():
            assert off < 1e-5, (name, is_quantized)
