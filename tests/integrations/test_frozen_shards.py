"""Frozen shards: processes that hold rows of the frozen weights train an adapter as one process does."""

import pytest
import torch

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model
from ranks import mesh_of, own_device, run_ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
CASES = {  # format, activation checkpointing, fused LoRA
    "nf4": (NF4(), False, True),
    "nf4-checkpointing": (NF4(), True, False),
    "nf4-double-quant-checkpointing": (NF4(double_quant=True), True, True),
    "int8": (Int8(threshold=0.0), False, False),
}
STEPS = 3


def _model(own, checkpointing, fused, *, tied=False):
    from bigq.integrations.fused_lora import fuse_lora

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=162,  # a multiple of no number of processes and blocks
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = load_and_quantize_model(model, None, QuantizationConfig(own), own_device())
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        settings = {"use_reentrant": False}
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if fused:
        fuse_lora(model)
    return model.train()


def _trained(model, adapters):
    """The logits of each step, the adapter after them, and logits in evaluation then."""
    ids = (torch.arange(40, device=own_device()) * 7 % 101).view(2, 20)
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    found = []
    for _ in range(STEPS):
        with torch.autocast(own_device().type, torch.bfloat16):
            out = model(input_ids=ids, labels=ids)
        found.append(out.logits.detach())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found += [adapter.detach() for adapter in adapters]
    with torch.no_grad():
        found.append(model.eval()(input_ids=ids).logits)
    return found


def _is_sharded(tensor):
    return hasattr(tensor, "to_local")


def _work(rank, folder):
    from torch.nn.parallel import DistributedDataParallel

    from bigq.integrations import frozen_shards

    frozen_shards.SMALLEST = 1024  # of tensors as small as these
    mesh, found = mesh_of(2), {}
    for name, case in CASES.items():
        for tied in (False, True) if name == "nf4" else (False,):
            one, model = _model(*case, tied=tied), _model(*case, tied=tied)
            nbytes = sum(p.nbytes for p in one.parameters() if not p.requires_grad)
            assert frozen_shards.shard_frozen(model, mesh) is model
            held = sum(
                (p.to_local() if _is_sharded(p) else p).nbytes for p in model.parameters() if not p.requires_grad
            )
            trained = _trained(one, [p for p in one.parameters() if p.requires_grad])
            copies = DistributedDataParallel(model)
            again = _trained(copies, [p for p in model.parameters() if p.requires_grad])
            whole = [
                n
                for n, p in model.named_parameters()
                if p.nbytes >= 1024 and not p.requires_grad and not _is_sharded(p)
            ]
            frozen_shards.reshard_frozen(model)
            state = dict(one.named_parameters(remove_duplicate=False))
            same = [
                torch.equal(p.full_tensor() if _is_sharded(p) else p, state[n])
                for n, p in model.named_parameters(remove_duplicate=False)
            ]
            found[name, tied] = {
                "equal": [torch.equal(a, b) for a, b in zip(trained, again, strict=True)],
                "state": len(same) == len(state) and all(same),
                "held": held / nbytes,
                "whole": len({n.split("layers.")[-1].split(".")[0] for n in whole}),
                "back": [n for n in whole if not _is_sharded(model.get_parameter(n))],
            }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    return run_ranks(_work, folder, str(folder), gpus=True)


@pytest.mark.parametrize("case", [*((name, False) for name in CASES), ("nf4", True)], ids=str)
def test_an_adapter_trains_as_in_one_process(found, case):
    for each in (own[case] for own in found):
        assert all(each["equal"]), each["equal"]
        assert each["state"]
        assert each["held"] < 0.6
        assert 1 <= each["whole"] <= 4  # two blocks and what stands around them
        assert not each["back"]
