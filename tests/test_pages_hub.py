"""The snippets that need the Hub run too, with a tiny model and data set in the place of those that they name."""

import pytest
import torch

from pages import ROOT, snippets

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")
pytest.importorskip("trl")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]
IN_PLACE_OF = {  # what a page says: what this machine can do
    '"Qwen/Qwen3-0.6B"': '"qwen"',
    '"Qwen/Qwen2.5-32B"': '"qwen"',
    'load_dataset("trl-lib/Capybara", split="train")': "CHATS",
    "max_steps=200)": 'max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no")',
}
if not torch.cuda.is_available():
    IN_PLACE_OF |= {
        'device_map={"": 0}': 'device_map={"": "cpu"}',
        'SFTConfig("run", ': 'SFTConfig("run", use_cpu=True, ',
        '{"": 0} | {': '{"": "cpu"} | {',
        'experts": "cpu" for layer': 'experts": "disk" for layer',
        "torch.cuda.set_device(rank)\n": "",
        "init_process_group()": 'init_process_group("gloo")',
        ", device_ids=[rank]": "",
    }
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder "qwen" with a tiny Qwen3 and its tokenizer; returns a few chats."""
    monkeypatch.chdir(tmp_path)
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "Name", "three", "rivers", "a", "b", "c"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=TEMPLATE, **special)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=len(words), eos_token_id=2, pad_token_id=0, **sizes, **heads)
    transformers.Qwen3ForCausalLM(config).save_pretrained("qwen")
    tokenizer.save_pretrained("qwen")
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c a"}]
    return datasets.Dataset.from_list([{"messages": chat}] * 16)


def run(page, namespace, *needs):
    """Run the snippets of a page that need certain things, with what stands in for these."""
    found = [snippet for snippet in snippets(ROOT / "docs" / page) if snippet.needs in needs]
    assert found, "a snippet that is not there tests nothing"
    replaced = 0
    for snippet in found:
        code = snippet.code
        for said, here in IN_PLACE_OF.items():
            replaced += code.count(said)
            code = code.replace(said, here)
        exec(compile(code, page, "exec"), namespace)
    assert replaced, "nothing of the Hub is named"


def test_generating_text(hub, capsys):
    namespace: dict[str, object] = {}
    run("transformers.md", namespace, "needs the network")
    assert namespace["ids"].shape[0] == 1
    assert namespace["ids"].shape[1] > namespace["inputs"]["input_ids"].shape[1]
    assert "user Name three" in capsys.readouterr().out
    assert namespace["model"].quantization_method == "bigq"


def test_training_and_merging_into_floats(hub, tmp_path):
    namespace = {"CHATS": hub}
    run("finetuning.md", namespace, "needs the network")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    served, merged = namespace["served"], namespace["base"]
    assert served.quantization_method == "bigq"
    assert not any("lora" in name for name, _ in served.named_parameters())
    weight = served.model.layers[0].mlp.up_proj.weight.dequantize().cpu().float()
    float_weight = merged.model.layers[0].mlp.up_proj.weight.float()
    assert 0.0 < (weight - float_weight).norm() / float_weight.norm() < 0.15


def test_a_model_over_several_gpus(hub):
    namespace: dict[str, object] = {}
    run("many-gpus.md", namespace, "needs two GPUs")
    assert namespace["model"].quantization_method == "bigq"


def test_several_processes(hub, monkeypatch):
    """As one process: DDP, then FSDP2."""
    settings = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    namespace: dict[str, object] = {}
    try:
        run("many-gpus.md", namespace, "needs several processes")
        ids = torch.arange(6)[None]
        namespace["model"](input_ids=ids, labels=ids).loss.backward()
        trained = {name for name, p in namespace["model"].named_parameters() if p.grad is not None}
        assert trained
        assert all("lora_" in name for name in trained)
    finally:
        torch.distributed.destroy_process_group()


def test_experts_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    run("experts.md", namespace, None, "needs a GPU")
    model = namespace["model"]
    places = {report.name: report.device for report in model.quantization_report.modules}
    assert places["model.layers.1.mlp.experts"] == ("cpu" if torch.cuda.is_available() else "disk")
    formats = {report.name: report.format for report in model.quantization_report.modules}
    assert formats["model.layers.1.mlp.experts"] == "nf4"
    assert model.generate(torch.arange(4, device=model.device)[None], max_new_tokens=3).shape == (1, 7)
