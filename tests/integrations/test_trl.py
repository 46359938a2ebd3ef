"""TRL's trainers on quantized models: they add the adapter themselves."""

import pytest
import torch

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from adapted import SIX_STEPS, state  # noqa: E402  # it imports peft
from bigq.integrations.fused_lora import fuse_lora  # noqa: E402
from tuners import llama, lora  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # by transformers
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]
ROWS = {
    "sft": {"text": ["a b c d e f g h"] * 16},
    "dpo": {"prompt": ["a b c "] * 16, "chosen": ["d e f"] * 16, "rejected": ["x y z"] * 16},
}


@pytest.fixture
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{chr(97 + i): 4 + i for i in range(26)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weight_format", [NF4(), Int8()], ids=["nf4", "int8"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_trainer_of_trl_lowers_its_loss(kind, weight_format, dtype, fused, tokenizer, tmp_path):
    config, trainer = {"sft": (trl.SFTConfig, trl.SFTTrainer), "dpo": (trl.DPOConfig, trl.DPOTrainer)}[kind]
    model = load_and_quantize_model(llama().to(dtype), None, QuantizationConfig(weight_format), "cpu")
    before = state(model)
    arguments = config(
        output_dir=str(tmp_path),
        **SIX_STEPS,
        bf16=dtype == torch.bfloat16,
    )
    run = trainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(ROWS[kind]),
        peft_config=lora(target_modules="all-linear"),
    )
    if fused:
        assert fuse_lora(run.model) == 14
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(run.model).items())
