"""Every tuner of PEFT, as a config for a tiny Llama."""

import peft
import torch
import transformers

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
NARROW = ["q_proj", "v_proj"]  # for tuners whose layers all have to be of one shape
IDS = torch.arange(24).view(2, 12) * 5 % 64
_SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**sizes):
    """The same weights in every call, larger than those of a new model, whose outputs are all alike."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_SIZES, **sizes}, initializer_range=0.15)).eval()


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})


def _tuner(kind, **settings):
    return getattr(peft, kind)(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})


def _prompt(kind, **settings):
    return getattr(peft, kind)(**{"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", **settings})


def _bdlora():
    blocks = peft.BdLoraConfig(
        nblocks=2, target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "v_proj"]
    )
    return lora(use_bdlora=blocks)


LORAS = {
    "lora": lora,
    "lora_all_linear": lambda: lora(target_modules="all-linear"),
    "lora_embedding_and_head": lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "lora_modules_to_save": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora_trainable_tokens": lambda: lora(trainable_token_indices=[1, 2, 3]),
    "lora_bias": lambda: lora(lora_bias=True),
    "lora_gaussian": lambda: lora(init_lora_weights="gaussian"),
    "lora_orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "lora_mica": lambda: lora(init_lora_weights="mica"),
    "lora_replication": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "alora": lambda: lora(alora_invocation_tokens=[10, 15]),
    "bdlora": _bdlora,
    "velora": lambda: lora(velora_config=peft.VeloraConfig()),
    "monteclora": lambda: lora(monteclora_config=peft.MontecloraConfig()),
    "adalora": lambda: _tuner("AdaLoraConfig", init_r=4, target_r=2, total_step=20),
    "gralora": lambda: _tuner("GraloraConfig", r=8),
    "delora": lambda: _tuner("DeloraConfig"),
    "randlora": lambda: _tuner("RandLoraConfig", r=8, randlora_alpha=16),
    "vblora": lambda: _tuner("VBLoRAConfig", num_vectors=16, vector_length=16),
    "unilora": lambda: _tuner("UniLoraConfig"),
    "tinylora": lambda: _tuner("TinyLoraConfig"),
    "vera": lambda: _tuner("VeraConfig", r=8, target_modules=NARROW),
    "pvera": lambda: _tuner("PveraConfig", r=8, target_modules=NARROW),
}
OTHERS = {
    "adamss": lambda: _tuner("AdamssConfig", r=8, num_subspaces=2),
    "beft": lambda: _tuner("BeftConfig"),
    "boft": lambda: _tuner("BOFTConfig", boft_block_size=4),
    "c3a": lambda: _tuner("C3AConfig", block_size=16),
    "deft": lambda: _tuner("DeftConfig"),
    "fourierft": lambda: _tuner("FourierFTConfig", n_frequency=50),
    "frod": lambda: _tuner("FrodConfig", progressbar=False),
    "hira": lambda: _tuner("HiraConfig", r=4),
    "hra": lambda: _tuner("HRAConfig"),
    "ia3": lambda: _tuner(
        "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "lily": lambda: _tuner("LilyConfig", r=4),
    "ln_tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "loha": lambda: _tuner("LoHaConfig", r=4),
    "lokr": lambda: _tuner("LoKrConfig", r=4),
    "miss": lambda: _tuner("MissConfig", r=8),
    "miss_bat": lambda: _tuner("MissConfig", r=8, init_weights="bat"),
    "oft": lambda: _tuner("OFTConfig", r=0, oft_block_size=8),
    "osf": lambda: _tuner("OSFConfig", effective_rank=4),
    "peanut": lambda: _tuner("PeanutConfig", r=4),
    "poly": lambda: _tuner("PolyConfig", r=4, n_tasks=2, n_skills=2),
    "psoft": lambda: _tuner("PsoftConfig", r=8),
    "road": lambda: _tuner("RoadConfig", group_size=16),
    "shadow": lambda: peft.ShadowConfig(r=4, shadow_num_hidden_layers=1, shadow_dropout=0.0, task_type="CAUSAL_LM"),
    "shira": lambda: _tuner("ShiraConfig", r=4),
    "supertuning": lambda: _tuner("SupertuningConfig"),
    "trainable_tokens": lambda: _tuner(
        "TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[1, 2, 3]
    ),
    "waveft": lambda: _tuner("WaveFTConfig", n_frequency=50),
}
PROMPTS = {
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    "cartridge": lambda: _prompt("CartridgeConfig"),
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 2, 3], task_type="CAUSAL_LM"
    ),
    "multitask_prompt": lambda: _prompt("MultitaskPromptTuningConfig", num_tasks=2),
    "p_tuning": lambda: _prompt("PromptEncoderConfig", encoder_hidden_size=16),
    "prefix_tuning": lambda: _prompt("PrefixTuningConfig"),
    "prompt_tuning": lambda: _prompt("PromptTuningConfig"),
}
TUNERS = LORAS | OTHERS | PROMPTS
# They compute the weight that they start from, and write it: see test_peft_starts.py.
STARTS = {
    "kasa": lambda: lora(kasa_config=peft.KasaConfig()),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
}


def inputs(name):
    """What the forward of the model gets, whichever tuner `name` it has."""
    if name in ("poly", "multitask_prompt"):
        return {"input_ids": IDS, "task_ids": torch.tensor([0, 1])}
    if name == "cpt":
        return {"input_ids": IDS, "input_type_mask": torch.ones_like(IDS)}
    return {"input_ids": IDS}
