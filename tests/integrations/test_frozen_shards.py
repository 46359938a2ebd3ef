"""Frozen shards: processes that hold rows of the frozen weights train an adapter as one process does."""

from unittest import mock

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

import bigq
from bigq import FP4, NF4, Int8, QuantizationConfig, load_and_quantize_model
from ranks import error_of, mesh_of, own_device, run_ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
CASES = {  # format, activation checkpointing, fused LoRA, tied embeddings
    "nf4": (NF4(), False, True, False),
    "nf4-tied": (NF4(), False, False, True),
    "nf4-checkpointing": (NF4(), True, False, False),
    "nf4-double-quant-checkpointing": (NF4(double_quant=True), True, True, False),
    "fp4": (FP4(block_size=32), False, True, False),
    "int8": (Int8(threshold=0.0), False, False, False),
}
LOADS = {"nf4": NF4(), "nf4-double-quant": NF4(double_quant=True)}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SMALLEST = 1024  # bytes: tensors as small as these are cut
STEPS = 3


def _config(kind, *, tied=False):
    return getattr(transformers, f"{kind}Config")(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=162,  # 81 rows in each of two processes
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=tied,
        pad_token_id=0,
        use_cache=False,
    )


def _with_adapter(model, **settings):
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings})
    )


def _model(own, checkpointing, fused, tied):
    from bigq.integrations.fused_lora import fuse_lora

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(_config("Llama", tied=tied)).to(torch.bfloat16)
    model = _with_adapter(load_and_quantize_model(model, None, QuantizationConfig(own), own_device()))
    if checkpointing:
        settings = {"use_reentrant": False}
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.enable_input_require_grads()  # as trainers do: gradients reach the output of the embedding
    if fused:
        fuse_lora(model)
    return model.train()


def _logits(model):
    ids = (torch.arange(40, device=own_device()) * 7 % 101).view(2, 20)
    return model(input_ids=ids, labels=ids)


def _trained(model, adapters):
    """The logits of each step, and the adapter after them."""
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    found = []
    for _ in range(STEPS):
        with torch.autocast(own_device().type, torch.bfloat16):
            out = _logits(model)
        found.append(out.logits.detach())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found + [adapter.detach() for adapter in adapters]


def _adapters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _is_sharded(tensor):
    return hasattr(tensor, "to_local")


def _whole(tensor):
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _frozen_bytes(model):
    return sum((p.to_local() if _is_sharded(p) else p).nbytes for p in model.parameters() if not p.requires_grad)


def _compare(one, model):
    """What training `model`, which is sharded, has in common with training `one`, which is not."""
    from torch.nn.parallel import DistributedDataParallel

    from bigq.integrations.frozen_shards import reshard_frozen

    held = _frozen_bytes(model) / _frozen_bytes(one)
    copies = DistributedDataParallel(model, find_unused_parameters=True)
    steps = _trained(one, _adapters(one)), _trained(copies, _adapters(model))
    with torch.no_grad():
        evaluated = torch.equal(_logits(one.eval()).logits, _logits(model.eval()).logits)
    large = {n: p for n, p in model.named_parameters() if not p.requires_grad and p.nbytes >= SMALLEST}
    whole = [name for name, parameter in large.items() if not _is_sharded(parameter)]
    reshard_frozen(model)
    state = dict(one.named_parameters(remove_duplicate=False))
    return {
        "equal": [torch.equal(a, b) for a, b in zip(*steps, strict=True)] + [evaluated],
        "different": [
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not torch.equal(_whole(parameter), state[name])
        ],
        "held": held,
        "whole": {name.split("layers.")[-1].partition(".")[0] for name in whole},  # blocks, and what is around them
        "back": [name for name in whole if not _is_sharded(model.get_parameter(name))],
    }


def _merged(one, model):
    """Whether merging, while some weights are gathered, and unmerging have the bits of one process."""
    found = []
    for merge in ("merge_adapter", "unmerge_adapter"):
        for each in (one, model):
            getattr(each, merge)()
        with torch.no_grad():
            found.append(torch.equal(_logits(one).logits, _logits(model).logits))
    return found


def _loaded(folder, mesh):
    """Loads straight into frozen shards, of which experts have an adapter too."""
    from bigq.integrations.frozen_shards import shard_frozen

    found = {}
    for kind, settings in (("Llama", {}), ("Qwen3Moe", EXPERTS)):
        for name, own in LOADS.items():
            config, place = QuantizationConfig(own), f"{folder}/{kind}"
            with init_empty_weights():
                skeletons = [getattr(transformers, f"{kind}ForCausalLM")(_config(kind)) for _ in range(2)]
            one = _with_adapter(load_and_quantize_model(skeletons[0], place, config, own_device()), **settings)

            def shard(model, settings=settings):
                return shard_frozen(_with_adapter(model, **settings), mesh)

            model = load_and_quantize_model(skeletons[1], place, config, mesh=mesh, shard=shard, progress=False)
            found[kind, name] = _compare(one, model)
            if kind == "Llama":
                found["merged", name] = _merged(one, model)
                bigq.save_quantized(model.get_base_model(), f"{folder}/saved-{name}")
    return found


def _by_trainer(rank, folder, mesh):
    """Whether transformers' Trainer makes the adapter that it makes with DDP, and `generate` the tokens."""
    from bigq.integrations.frozen_shards import shard_frozen

    models = _model(*CASES["nf4-checkpointing"]), shard_frozen(_model(*CASES["nf4-checkpointing"]), mesh)
    for number, model in enumerate(models):
        settings = transformers.TrainingArguments(
            output_dir=f"{folder}/trainer-{number}",
            per_device_train_batch_size=1,
            max_steps=2,
            learning_rate=1e-2,
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=own_device().type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        rows = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(8)]
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows)
        trainer.train()
        trainer.save_model(f"{folder}/trained-{number}")
    torch.distributed.barrier()
    saved = [load_file(f"{folder}/trained-{number}/adapter_model.safetensors") for number in (0, 1)]
    ids = torch.arange(10, device=own_device()).view(1, 10)
    with torch.no_grad():
        tokens = [model.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False) for model in models]
    return (
        saved[0].keys() == saved[1].keys(),
        all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0]),
        (torch.equal(*tokens)),
    )


def _assigned(mesh):
    """Whether a head that is assigned after a call, whole, is the one that computes then, forward and backward."""
    from bigq.integrations.frozen_shards import shard_frozen

    one, model = _model(*CASES["nf4"]), shard_frozen(_model(*CASES["nf4"]), mesh)
    found = []
    for each in (one, model):
        _logits(each).loss.backward()
        head = each.get_base_model().lm_head
        torch.manual_seed(2)
        weight = torch.randn(101, 64, dtype=torch.bfloat16, device=own_device())
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        each.zero_grad()
        out = _logits(each)
        out.loss.backward()
        found.append([out.logits.detach(), *(adapter.grad for adapter in _adapters(each))])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _has_dtensor(mesh):
    """What accelerate, which refuses DTensors in DDP, finds in frozen shards, parts of them, and those of FSDP2."""
    from accelerate import accelerator
    from torch.distributed.fsdp import fully_shard

    from bigq.integrations.frozen_shards import shard_frozen

    models = [shard_frozen(_model(*CASES["nf4"]), mesh) for _ in range(2)]
    models += [models[0].get_base_model(), torch.nn.ModuleList(models)]
    models.append(fully_shard(torch.nn.Linear(8, 8).to(own_device()), mesh=mesh))
    models.append(torch.nn.ModuleList(models))
    return [accelerator.model_has_dtensor(model) for model in models]


def _wrapped(mesh):
    """What DDP says of another model than the one in frozen shards: a part of it, and one that holds it."""
    from torch.nn.parallel import DistributedDataParallel

    from bigq.integrations.frozen_shards import shard_frozen

    model = shard_frozen(_model(*CASES["nf4"]), mesh)
    others = [model.get_base_model(), torch.nn.ModuleDict({"model": model})]
    return [error_of(lambda other=other: DistributedDataParallel(other)) for other in others]


def _refused(mesh):
    from bigq.integrations.frozen_shards import reshard_frozen, shard_frozen

    model = _model(*CASES["nf4"])
    said = [error_of(lambda: reshard_frozen(model))]
    sharded = shard_frozen(model, mesh)
    said.append(error_of(lambda: shard_frozen(sharded, mesh)))
    said.append(error_of(lambda: shard_frozen(torch.nn.Linear(64, 64), mesh)))
    return said, sharded is model


def _work(rank, folder):
    from bigq.integrations.frozen_shards import shard_frozen

    mesh = mesh_of(2)
    with mock.patch("bigq.integrations.frozen_shards.SMALLEST", SMALLEST):
        trained = {name: _compare(_model(*case), shard_frozen(_model(*case), mesh)) for name, case in CASES.items()}
        found = {"assigned": _assigned(mesh), "refused": _refused(mesh), "has dtensor": _has_dtensor(mesh)}
        return {**trained, **found, "wrapped": _wrapped(mesh)}


def _work_with_loads(rank, folder):
    mesh = mesh_of(2)
    with mock.patch("bigq.integrations.frozen_shards.SMALLEST", SMALLEST):
        return {**_loaded(folder, mesh), "by trainer": _by_trainer(rank, folder, mesh)}


@pytest.fixture(scope="module")
def found(tmp_path_factory, nccl):
    folder = tmp_path_factory.mktemp("frozen")
    return run_ranks(_work, folder, str(folder), gpus=nccl)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, nccl):
    folder = tmp_path_factory.mktemp("loaded")
    torch.manual_seed(0)
    for kind in ("Llama", "Qwen3Moe"):
        model = getattr(transformers, f"{kind}ForCausalLM")(_config(kind)).to(torch.bfloat16)
        model.save_pretrained(folder / kind)
    return run_ranks(_work_with_loads, folder, str(folder), gpus=nccl)


def _check(each):
    assert all(each["equal"]), each["equal"]
    assert not each["different"]
    assert 0.4 < each["held"] < 0.6
    assert 1 <= len(each["whole"]) <= 4  # two blocks, the embedding and the head
    assert not each["back"]


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_trains_as_in_one_process(found, case):
    for each in found:
        _check(each[case])


@pytest.mark.slow  # 40 s of CPU time, with the two that follow
@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3Moe"])
def test_a_load_into_frozen_shards_trains_as_one_into_one_process(loaded, kind, name):
    for each in loaded:
        _check(each[kind, name])


@pytest.mark.slow
def test_a_trainer_makes_the_adapter_that_it_makes_with_ddp(loaded):
    assert [each["by trainer"] for each in loaded] == [(True, True, True)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
def test_an_adapter_is_merged_into_the_shards(loaded, name):
    assert [own["merged", name] for own in loaded] == [[True, True]] * 2


def test_a_tensor_that_is_assigned_later_is_cut_too(found):
    assert [each["assigned"] for each in found] == [True, True]


def test_accelerate_finds_no_dtensor_in_frozen_shards(found):
    assert [each["has dtensor"] for each in found] == [[False] * 4 + [True] * 2] * 2


def test_another_model_than_the_one_in_frozen_shards_is_refused_by_ddp(found):
    for part, holder in (own["wrapped"] for own in found):
        assert part.startswith("UnsupportedError: LlamaForCausalLM is a part of the model that shard_frozen was called")
        assert holder.startswith("UnsupportedError: ModuleDict holds the model that shard_frozen was called with")


def test_what_cannot_be_sharded_is_refused(found):
    for (unknown, twice, trained), same in (own["refused"] for own in found):
        assert unknown.startswith("ConfigError: PeftModel holds no weights in frozen shards")
        assert "parameters of PeftModel are sharded already" in twice
        assert trained.startswith("ConfigError: Linear has no frozen tensor of 1024 bytes or more")
        assert same
