"""Adapters are merged into frozen shards, quantized and kept, with the bits of a merge in one process."""

from copy import deepcopy
from unittest import mock

import pytest
import torch

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model
from bigq.system.internals import SEES_EDITS
from ranks import error_of, mesh_of, own_device, run_ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from tuners import IDS, LORAS, OTHERS, llama  # noqa: E402 - it needs peft

SMALLEST = 1024  # bytes: tensors as small as these are cut
FORMATS = {"nf4": NF4(), "nf4-double-quant": NF4(double_quant=True), "int8": Int8()}
TUNERS = ["lora_trainable_tokens", "dora", "loha", "lokr", "ia3", "boft", "oft", "hra", "vera", "shira"]
TUNERS += ["adalora", "trainable_tokens"]
EVERYWHERE = "lora_embedding_and_head"  # of which the embedding and the head are kept
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def _adapted(own, tuner, **sizes):
    """A tiny Llama with an adapter of random numbers."""
    model = load_and_quantize_model(llama(**sizes), None, QuantizationConfig(own), own_device())
    model = peft.get_peft_model(model.requires_grad_(False), {**LORAS, **OTHERS}[tuner]())
    return _random(model)


def _with_experts(own):
    """A tiny Qwen3-MoE with adapters of experts, quantized in one block and kept in the other."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=2,
        mlp_only_layers=[],
        pad_token_id=0,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    config = QuantizationConfig(own, rules={"model.layers.1.*": None})
    model = load_and_quantize_model(model, None, config, own_device()).requires_grad_(False)
    return _random(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], target_parameters=STACKS)))


def _random(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape).to(parameter) / 8
    return model.eval()


def _called(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(own_device())).logits


def _is_sharded(tensor):
    return hasattr(tensor, "to_local")


def _different(one, model):
    """The names of tensors of `model`, in shards, that are not those of `one`."""
    from bigq.integrations.frozen_shards import reshard_frozen

    if hasattr(model, "peft_config"):
        reshard_frozen(model)
    state = dict(one.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == state.keys()
    whole = {name: own.full_tensor() if _is_sharded(own) else own for name, own in found.items()}
    return [name for name in state if not torch.equal(whole[name], state[name])]


def _merged(make, mesh):
    """What differs from one process at each step, and whether a merge changed what it should."""
    from bigq.integrations.frozen_shards import shard_frozen

    one, model = make(), shard_frozen(make(), mesh)
    before = {name: own.detach().clone() for name, own in one.named_parameters()}
    found, changed = {}, []
    _called(model)  # some blocks are whole from here on
    for step, call in {
        "merge": lambda each: each.merge_adapter(),
        "unmerge": lambda each: each.unmerge_adapter(),
        "safe merge": lambda each: each.merge_adapter(safe_merge=True),
    }.items():
        if step == "unmerge" and error_of(lambda: deepcopy(one).unmerge_adapter()):
            return {**found, "changed": any(changed)}  # PEFT does not unmerge this one
        call(one)
        call(model)
        changed.append(any(not torch.equal(before[name], own) for name, own in one.named_parameters()))
        found[step] = [] if torch.equal(_called(one), _called(model)) else ["logits"]
        found[step] += _different(one, model)
        _called(model)
    one.unmerge_adapter()
    model.unmerge_adapter()
    if error_of(lambda: deepcopy(one).merge_and_unload()):
        return {**found, "changed": any(changed)}  # PEFT refuses it
    merged = [each.merge_and_unload() for each in (one, model)]
    found["unload"] = [] if torch.equal(*map(_called, merged)) else ["logits"]
    model.base_model.model = merged[1]
    found["unload"] += _different(*merged)
    return {**found, "changed": any(changed)}


def _added_later(mesh):
    """What differs from one process if adapters are added to a model in frozen shards, and merged after a call."""
    from bigq.integrations.frozen_shards import reshard_frozen, shard_frozen

    bases = [load_and_quantize_model(llama(), None, QuantizationConfig(NF4()), own_device()) for _ in range(2)]
    shard_frozen(bases[1].requires_grad_(False), mesh)
    one, model = (_random(peft.get_peft_model(base, LORAS[EVERYWHERE]())) for base in bases)
    same = [torch.equal(_called(one), _called(model))]
    one.merge_adapter()
    model.merge_adapter()
    same.append(torch.equal(_called(one), _called(model)))
    reshard_frozen(bases[1])
    return same, _different(one, model)


def _copied(mesh):
    """Whether a merge into a copy leaves the model as it was, and has the bits of one process."""
    from bigq.integrations.frozen_shards import shard_frozen

    one, model = _adapted(NF4(), EVERYWHERE), shard_frozen(_adapted(NF4(), EVERYWHERE), mesh)
    _called(model)
    copy = deepcopy(model)
    _called(copy)
    copy.merge_adapter()
    left = _different(one, model)
    one.merge_adapter()
    return left, _different(one, copy), bool(_different(one, model))


def _failed(mesh):
    """What a merge that fails in its last layer says, and whether that layer holds the codes and scales of before."""
    from bigq.integrations.frozen_shards import shard_frozen

    one, model = _adapted(NF4(), EVERYWHERE), shard_frozen(_adapted(NF4(), EVERYWHERE), mesh)
    _called(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    vars(layer)["merged_adapters"] = None  # to which PEFT appends when it has written the weight
    said = error_of(lambda: layer.merge(adapter_names=["default"]))
    vars(layer)["merged_adapters"] = []
    return said, _different(one, model)


def _costs(mesh):
    """Whether `merge_costs` says in shards what it says in one process, and changes nothing."""
    from bigq.integrations.frozen_shards import reshard_frozen, shard_frozen
    from bigq.integrations.peft import merge_costs

    one, model = _adapted(NF4(), EVERYWHERE), shard_frozen(_adapted(NF4(), EVERYWHERE), mesh)
    expected, out = merge_costs(one), model(input_ids=IDS.to(own_device())).logits
    same = [merge_costs(model) == expected]  # with whole weights in some blocks
    out.square().mean().backward()
    reshard_frozen(model)
    same.append(merge_costs(model) == expected)
    return same, _different(one, model)


def _merged_before_backward(mesh):
    """What a backward pass says after a merge that came between it and its forward pass, and a step after that."""
    from bigq.integrations.frozen_shards import shard_frozen

    said, found = [], []
    for model in (_adapted(NF4(), EVERYWHERE), shard_frozen(_adapted(NF4(), EVERYWHERE), mesh)):
        out = model(input_ids=IDS.to(own_device())).logits.square().mean()
        model.merge_adapter()
        said.append(error_of(out.backward))
        model.unmerge_adapter()
        model.zero_grad()
        model(input_ids=IDS.to(own_device())).logits.square().mean().backward()
        found.append([own.grad for own in model.parameters() if own.requires_grad])
    return said, all(map(torch.equal, *found))


def _work(rank, folder):
    mesh = mesh_of(2)
    with mock.patch("bigq.integrations.frozen_shards.SMALLEST", SMALLEST):
        formats = {name: _merged(lambda own=own: _adapted(own, EVERYWHERE), mesh) for name, own in FORMATS.items()}
        return {
            **formats,
            "tied": _merged(lambda: _adapted(NF4(), "lora_all_linear", tie_word_embeddings=True), mesh),
            "experts": _merged(lambda: _with_experts(NF4()), mesh),
            "added later": _added_later(mesh),
            "copied": _copied(mesh),
            "failed": _failed(mesh),
            "costs": _costs(mesh),
            "before backward": _merged_before_backward(mesh),
        }


def _work_with_tuners(rank, folder):
    mesh = mesh_of(2)
    with mock.patch("bigq.integrations.frozen_shards.SMALLEST", SMALLEST):
        return {name: _merged(lambda name=name: _adapted(NF4(), name), mesh) for name in TUNERS}


@pytest.fixture(scope="module")
def found(tmp_path_factory, nccl):
    folder = tmp_path_factory.mktemp("merges")
    return run_ranks(_work, folder, str(folder), gpus=nccl)


@pytest.fixture(scope="module")
def with_tuners(tmp_path_factory, nccl):
    folder = tmp_path_factory.mktemp("tuners")
    return run_ranks(_work_with_tuners, folder, str(folder), gpus=nccl)


@pytest.mark.parametrize("name", [*FORMATS, "tied", "experts"])
def test_an_adapter_is_merged_and_unmerged_as_in_one_process(found, name):
    expected = {"merge": [], "unmerge": [], "safe merge": [], "unload": [], "changed": True}
    assert [each[name] for each in found] == [expected] * 2


@pytest.mark.slow  # 30 s of CPU time
@pytest.mark.parametrize("name", TUNERS)
def test_each_tuner_is_merged_as_in_one_process(with_tuners, name):
    for each in with_tuners:
        assert not any(different for step, different in each[name].items() if step != "changed")
        assert each[name]["changed"]


def test_an_adapter_that_is_added_later_is_merged_too(found):
    assert [each["added later"] for each in found] == [([True, True], [])] * 2


def test_a_merge_into_a_copy_leaves_the_model_as_it_was(found):
    assert [each["copied"] for each in found] == [([], [], True)] * 2


def test_a_merge_that_fails_leaves_the_weight_as_it_was(found):
    for said, different in (each["failed"] for each in found):
        assert said.startswith("AttributeError")
        assert not different


def test_merge_costs_are_those_of_one_process(found):
    assert [each["costs"] for each in found] == [([True, True], [])] * 2


@pytest.mark.skipif(not SEES_EDITS, reason="torch does not tell edits")
def test_a_merge_between_forward_and_backward_is_refused_as_in_one_process(found):
    for (in_one, in_shards), same in (each["before backward"] for each in found):
        assert "Error" in in_one
        assert in_shards.startswith("UnsupportedError: weights of base_model.model.lm_head")
        assert same
