"""Adapters in a load into shards: they train as in one process, and one that is added too late is refused."""

import pytest
import torch
from accelerate import init_empty_weights

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model
from processes_of_mesh import error_of, held_by_all, mesh_of, own_device, run_ranks

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FORMATS = {"nf4": NF4(), "nf4-double-quant": NF4(double_quant=True), "int8": Int8()}
IDS = torch.arange(32).view(2, 16) * 7 % 120


def _config(kind):
    return getattr(transformers, f"{kind}Config")(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
        pad_token_id=0,
    )


def _skeleton(kind):
    with init_empty_weights():
        return getattr(transformers, f"{kind}ForCausalLM")(_config(kind))


def _with_adapter(model):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj", "lm_head"])
    return peft.get_peft_model(model, config)


def _trained(model):
    """Losses, gradients and adapter of two steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found, ids = [], IDS.to(own_device())
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), {name: _whole(gradient) for name, gradient in gradients.items()}))
        optimizer.step()
        optimizer.zero_grad()
    adapter = {name: _whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    return [*found, (torch.tensor(0.0), adapter)]


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _work(rank, folder):
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(2)

    def shard(model):
        model = _with_adapter(model)
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def shard_blocks(model):
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)

    found, ids = {}, IDS.to(own_device())
    for name, weight_format in FORMATS.items():
        config = QuantizationConfig(weight_format)
        whole = _with_adapter(load_and_quantize_model(_skeleton("Llama"), f"{folder}/Llama", config, own_device()))
        model = load_and_quantize_model(_skeleton("Llama"), f"{folder}/Llama", config, mesh=mesh, shard=shard)
        found[name] = all(
            torch.equal(loss, expected_loss)
            and tensors.keys() == expected.keys()
            and all(torch.equal(tensors[key], expected[key]) for key in expected)
            for (loss, tensors), (expected_loss, expected) in zip(_trained(model), _trained(whole), strict=True)
        )
        stacks = QuantizationConfig(weight_format)
        whole = load_and_quantize_model(_skeleton("Qwen3Moe"), f"{folder}/Qwen3Moe", stacks, own_device())
        model = load_and_quantize_model(_skeleton("Qwen3Moe"), f"{folder}/Qwen3Moe", stacks, mesh=mesh)
        held, expected = held_by_all(model), whole.state_dict()
        read, whole_read = (
            sum(stage.nbytes for stage in each.quantization_report.stages if stage.name == "read")
            for each in (model, whole)
        )
        found[f"{name}-experts"] = (
            all(torch.equal(tensor, expected[key]) for key, tensor in held.items()),
            torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits),
            read / whole_read,
            sum("experts.gate_up_proj_packed" in key for key in held),
        )
    found["prepared"] = fsdp2_prepare_model(None, model) is model
    config = QuantizationConfig("nf4")
    late = load_and_quantize_model(_skeleton("Llama"), f"{folder}/Llama", config, mesh=mesh, shard=shard_blocks)
    late = _with_adapter(late)
    found["late"] = error_of(lambda: late.train()(input_ids=ids, labels=ids).loss.backward())
    with torch.no_grad():
        found["evaluated"] = late(input_ids=ids).logits.isfinite().all().item()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory, nccl):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for kind in ("Llama", "Qwen3Moe"):
        model = getattr(transformers, f"{kind}ForCausalLM")(_config(kind)).to(torch.bfloat16)
        model.save_pretrained(folder / kind)
    return run_ranks(_work, folder, str(folder), world=2, gpus=nccl)


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_trains_as_in_one_process(found, name):
    assert [each[name] for each in found] == [True, True]


@pytest.mark.parametrize("name", FORMATS)
def test_each_process_reads_its_experts(found, name):
    for same_state, same_logits, read, count in (each[f"{name}-experts"] for each in found):
        assert same_state
        assert same_logits
        assert count == 2  # layers
        assert 0.4 < read < 0.65  # 3 or 2 of 5 experts


def test_an_adapter_that_is_added_after_sharding_is_refused(found):
    for each in found:
        assert each["late"].startswith("UnsupportedError: 6 trained parameters were added to FSDPLlamaDecoderLayer")
        assert "add the adapter in `shard`, before fully_shard" in each["late"]
        assert each["evaluated"]


def test_accelerate_takes_the_model_as_it_is_sharded(found):
    assert [each["prepared"] for each in found] == [True, True]
