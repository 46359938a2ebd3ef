"""Adapters of quantized models trained with FSDP2 by accelerate and transformers: the bits of one process."""

import importlib.util
import os
import warnings
from unittest import mock

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.state import AcceleratorState
from safetensors import safe_open

from bigq import FP4, NF4, Int8, QuantizationConfig, load_and_quantize_model, save_quantized
from bigq.ops import adapted
from bigq.system.internals import TELLS_LISTENERS
from ranks import error_of, run_ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # 70 s of CPU time: two processes import accelerate and transformers, and train

FORMATS = {"nf4": NF4(), "nf4-double-quant": NF4(double_quant=True), "fp4": FP4(), "int8": Int8()}
NESTED = FORMATS["nf4-double-quant"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {  # what differs from: no mixed precision, float32 adapters, whole weights on each process before
    **{name: {"own": own} for name, own in FORMATS.items()},
    "bfloat16-adapters": {"own": NESTED, "adapters": torch.bfloat16},
    "ram-efficient": {"own": NESTED, "cpu_ram_efficient_loading": True},
    "checkpointing": {"own": NESTED, "activation_checkpointing": True},
    "offload": {"own": NESTED, "cpu_offload": True},
    "ram-efficient-offload": {"own": Int8(), "cpu_ram_efficient_loading": True, "cpu_offload": True},
    **{f"mixed-precision-{name}": {"own": own, "mixed_precision": "bf16"} for name, own in FORMATS.items()},
    "mixed-precision-ram-efficient-checkpointing": {
        "own": NESTED,
        "mixed_precision": "bf16",
        "cpu_ram_efficient_loading": True,
        "activation_checkpointing": True,
    },
    "fused-bfloat16-adapters": {"own": NESTED, "adapters": torch.bfloat16, "fused": True},
    "fused-mixed-precision-checkpointing": {
        "own": NF4(),
        "fused": True,
        "mixed_precision": "bf16",
        "activation_checkpointing": True,
    },
    "experts": {"own": NF4(), "experts": True},
    "adapters-of-experts": {"own": NF4(), "experts": True, "target_parameters": EXPERTS},
    "experts-int8-mixed-precision": {"own": Int8(), "experts": True, "mixed_precision": "bf16"},
}
STEPS = 2


def _model(own, adapters=torch.float32, *, experts=False, target_parameters=None):
    from mixtures import mixture
    from tuners import TARGETS, llama, lora

    if experts == "transposed":
        model = mixture("Llama4ForCausalLM")
    elif experts:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 5, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, initializer_range=0.15))
    else:
        model = llama()
    model = load_and_quantize_model(model.to(torch.bfloat16), None, QuantizationConfig(own), "cpu")
    targets = TARGETS[:3] if experts else TARGETS
    torch.manual_seed(1)
    settings = lora(init_lora_weights=False, target_modules=targets, target_parameters=target_parameters)
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapters)
    return model


def _train(model, optimizer, backward, autocast=False):
    """The logits of each step, of the same tokens on each process, so that averaged gradients are those of one."""
    from tuners import IDS

    logits = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=IDS, labels=IDS)
        logits.append(out.logits.detach().float())
        backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
    return logits


def _adapters(model):
    """The trained tensors by name, whole, without the wrappers of activation checkpointing."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): p.full_tensor() if hasattr(p, "to_local") else p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _accelerator(**settings):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    AcceleratorState._reset_state(reset_partial_state=False)
    mixed_precision, offload = settings.pop("mixed_precision", "no"), settings.pop("cpu_offload", False)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        **{"cpu_ram_efficient_loading": False, "activation_checkpointing": False, **settings},
    )
    if offload:
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is no GPU to pin memory for
    return Accelerator(cpu=True, mixed_precision=mixed_precision, fsdp_plugin=plugin)


def _prepared(
    own,
    adapters=torch.float32,
    experts=False,
    target_parameters=None,
    fused=False,
    mixed_precision="no",
    **settings,
):
    """Whether logits of each step, trained tensors and frozen bits are those of one process, and all are shards."""
    model, one = (_model(own, adapters, experts=experts, target_parameters=target_parameters) for _ in range(2))
    if fused:
        from bigq.integrations.fused_lora import fuse_lora

        assert fuse_lora(model) == fuse_lora(one) == 8
    layer = "MixtralDecoderLayer" if experts else "LlamaDecoderLayer"
    accelerator = _accelerator(mixed_precision=mixed_precision, transformer_cls_names_to_wrap=[layer], **settings)
    model, optimizer = accelerator.prepare(model, _optimizer(model))
    with mock.patch("bigq.ops.adapted.input_gradient", wraps=adapted.input_gradient) as fused_calls:
        logits = _train(model, optimizer, accelerator.backward)
    expected = _train(one, _optimizer(one), lambda loss: loss.backward(), autocast=mixed_precision == "bf16")
    trained, alone = _adapters(model), _adapters(one)
    frozen = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}
    return {
        "logits": all(map(torch.equal, logits, expected)),
        "adapters": trained.keys() == alone.keys() and all(torch.equal(trained[n], alone[n]) for n in alone),
        "changed": not torch.equal(logits[0], logits[1]),
        "shards": all(hasattr(p, "to_local") for p in model.parameters()),
        "fused": fused_calls.called == (fused and TELLS_LISTENERS),
        "bits": all(
            torch.equal(frozen[name].full_tensor(), p) for name, p in one.named_parameters() if not p.requires_grad
        ),
    }


def _worker(rank, folder, has_trl):
    from accelerate_cpu import allow_fsdp_on_cpu

    warnings.simplefilter("ignore")
    allow_fsdp_on_cpu()
    found = {name: _prepared(**case) for name, case in CASES.items()}
    found["merged"] = {name: _merged(own) for name, own in FORMATS.items()}
    found["merged"]["experts"] = _merged(NF4(), experts=True)
    found["merged"]["transposed-experts"] = _merged(NF4(), experts="transposed")
    found["saved"] = _saved(folder)
    found["trainer"] = _trainer(folder)
    if has_trl:
        found["sft"] = _sft_in_shards(folder)
    found["from_pretrained"] = _from_pretrained(rank, folder)
    return found


def _shards(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _same(model, one):
    expected = dict(one.named_parameters())
    return all(torch.equal(p.full_tensor(), expected[name]) for name, p in model.named_parameters())


def _merged(own, *, experts=False):
    """Whether merging, and unmerging, an adapter in shards gives the bits that one process gives."""
    settings = {"experts": experts, "target_parameters": EXPERTS} if experts else {}
    model, one = _shards(_model(own, **settings)), _model(own, **settings)
    before = [p.full_tensor().clone() for p in model.parameters()]
    for each in (model, one):
        each.merge_adapter()
    merged = _same(model, one)
    rows = [p.placements[0].is_shard(0) for p in model.parameters()]
    changed = not all(map(torch.equal, before, [p.full_tensor() for p in model.parameters()]))
    for each in (model, one):
        each.unmerge_adapter()
    undone = all(map(torch.equal, before, [p.full_tensor() for p in model.parameters()]))
    for each in (model, one):
        each.merge_adapter(safe_merge=True)
    return {"merged": merged and changed, "rows": all(rows), "undone": undone, "safe": _same(model, one)}


def _saved(folder):
    """What `save_pretrained` says of shards, and whether accelerate's and bigq's own ways save the whole model."""
    from tuners import IDS, llama

    def quantized():
        return load_and_quantize_model(llama().to(torch.bfloat16), None, QuantizationConfig(NESTED), "cpu")

    one, model = quantized(), quantized()
    accelerator = _accelerator(transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type="FULL_STATE_DICT")
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    refused = error_of(lambda: model.save_pretrained(f"{folder}/refused"))
    accelerator.save_model(model, f"{folder}/accelerate")
    save_quantized(model, f"{folder}/bigq")
    gathered, is_main = accelerator.get_state_dict(model), accelerator.is_main_process
    half = dict(list(gathered.items())[::2])
    lacking = error_of(lambda: model.save_pretrained(f"{folder}/lacking", state_dict=half)) if is_main else refused
    model.save_pretrained(f"{folder}/gathered", is_main_process=is_main, state_dict=gathered)
    accelerator.wait_for_everyone()
    with init_empty_weights():
        skeleton = transformers.LlamaForCausalLM(one.config)
    loaded = load_and_quantize_model(skeleton, f"{folder}/accelerate", None, "cpu")
    opened = [transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("bigq", "gathered")]
    expected = one.state_dict()
    with safe_open(f"{folder}/gathered/model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert saved["model.layers.0.mlp.up_proj.weight"] == (0,)  # transformers without bigq raises
    return (
        refused,
        lacking,
        [
            torch.equal(model(IDS).logits, one(IDS).logits),
            *(all(torch.equal(p, expected[name]) for name, p in each.named_parameters()) for each in (loaded, *opened)),
        ],
    )


def _trainer(folder):
    """Two steps of transformers' Trainer, and what its adapter is on one process."""
    from tuners import IDS

    model, one = (_model(NESTED) for _ in range(2))
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/trainer",
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        report_to=[],
        disable_tqdm=True,
    )
    samples = [{"input_ids": row, "labels": row} for row in IDS] * 8
    samples = [samples[0]] * len(samples)  # the same for each process, whatever it draws
    AcceleratorState._reset_state(reset_partial_state=False)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model(f"{folder}/adapter")
    trainer.accelerator.wait_for_everyone()
    optimizer, batch = _optimizer(one), IDS[:1].repeat(2, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(STEPS):
        one(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, alone = _adapters(trainer.model), _adapters(one)
    worst = max(float((trained[name] - alone[name]).norm() / alone[name].norm()) for name in alone)
    opened = peft.PeftModel.from_pretrained(_model(NESTED).unload(), f"{folder}/adapter", is_trainable=True)
    same = all(torch.equal(tensor, trained[name]) for name, tensor in _adapters(opened).items())
    return {"error": worst, "saved": same, "shards": all(hasattr(p, "to_local") for p in trainer.model.parameters())}


def _sft(folder, **settings):
    """The losses of four steps of TRL's SFTTrainer, which adds the adapter itself, and the model that it trained."""
    import datasets
    import trl
    from tokenizers import Tokenizer, models

    from tuners import IDS, llama, lora

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = load_and_quantize_model(llama().to(torch.bfloat16), None, QuantizationConfig(NESTED), "cpu")
    arguments = trl.SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=True,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"input_ids": [IDS[0].tolist()] * 16}),
        peft_config=lora(target_modules="all-linear"),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def _sft_in_shards(folder):
    AcceleratorState._reset_state(reset_partial_state=False)
    shards = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "activation_checkpointing": True}
    losses, model = _sft(f"{folder}/sft", gradient_checkpointing=False, fsdp=True, fsdp_config=shards)
    return losses, all(hasattr(p, "to_local") for p in model.parameters())


def _from_pretrained(rank, folder):
    """Whether each process gets all weights where transformers would give them to the first one alone."""
    import bigq.integrations.transformers  # noqa: F401
    from tuners import llama

    if rank == 0:
        llama().to(torch.bfloat16).save_pretrained(f"{folder}/float")
    torch.distributed.barrier()
    names = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
    with mock.patch.dict(os.environ, names):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/float", quantization_config=QuantizationConfig(NESTED)
        )
    one = _model(NESTED).unload()
    return all(map(torch.equal, model.parameters(), one.parameters()))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return run_ranks(_worker, folder, str(folder), importlib.util.find_spec("trl") is not None)


@pytest.mark.parametrize("case", CASES)
def test_training_with_accelerate_gives_the_bits_of_one_process(found, case):
    for rank in found:
        assert rank[case] == dict.fromkeys(("logits", "adapters", "changed", "shards", "fused", "bits"), True)


@pytest.mark.parametrize("name", [*FORMATS, "experts", "transposed-experts"])
def test_adapters_are_merged_row_by_row_on_each_process(found, name):
    for rank in found:
        assert rank["merged"][name] == dict.fromkeys(("merged", "rows", "undone", "safe"), True)


def test_a_model_in_shards_is_saved_whole_or_refused_in_words(found):
    for rank in found:
        refused, lacking, same = rank["saved"]
        for said in (refused, lacking):
            assert said.startswith("UnsupportedError: save_pretrained cannot save the shards of a quantized model")
        assert same == [True, True, True, True]


def test_the_trainer_of_transformers_trains_and_saves_the_adapter(found):
    for rank in found:
        assert rank["trainer"]["shards"]
        assert rank["trainer"]["saved"]
        assert rank["trainer"]["error"] < 1e-5  # its loss is a sum divided by the tokens of all processes


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_a_trainer_of_trl_learns_what_it_learns_in_one_process(found, tmp_path):
    pytest.importorskip("trl")
    expected, _ = _sft(tmp_path)
    for rank in found:
        losses, are_shards = rank["sft"]
        assert are_shards
        assert losses[-1] < 0.6 * losses[0]
        assert all(abs(loss / alone - 1) < 0.02 for loss, alone in zip(losses, expected, strict=True))


def test_from_pretrained_gives_each_process_its_weights_if_loading_is_to_spare_memory(found):
    assert [rank["from_pretrained"] for rank in found] == [True, True]
