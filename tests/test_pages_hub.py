"""The snippets that need the Hub run too, with a tiny model and data set in the place of those that they name."""

import pytest
import torch

from bigq import QuantizationConfig
from pages import ROOT, Snippet, snippets
from scaled_checkpoints import e2m1_numbers, write

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
    '"Qwen/Qwen3-30B-A3B"': '"qwen-moe"',
    '"openai/gpt-oss-20b"': '"gpt-oss"',
    "tp_size=2": "tp_size=1",  # as many as there are processes
    'load_dataset("trl-lib/Capybara", split="train")': "CHATS",
    'mode="reduce-overhead"': 'backend="aot_eager"',  # inductor compiles C++ for the CPU
    "max_steps=200)": 'max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no")',
}
if not torch.cuda.is_available():
    IN_PLACE_OF |= {
        'device_map={"": 0}': 'device_map={"": "cpu"}',
        'SFTConfig("run", ': 'SFTConfig("run", use_cpu=True, ',
        '{"": 0} | {': '{"": "cpu"} | {',
        'experts": "cpu" for layer': 'experts": "disk" for layer',
        "torch.cuda.set_device(rank)\n": "",
        'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))\n': "",
        'init_device_mesh("cuda"': 'init_device_mesh("cpu"',
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
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(words), eos_token_id=2, pad_token_id=0, **sizes, **heads, **experts
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained("qwen-moe")
    tokenizer.save_pretrained("qwen")
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c a"}]
    return datasets.Dataset.from_list([{"messages": chat}] * 16)


def run(page, namespace, *needs):
    """Run the snippets of a page that need certain things, with what stands in for these."""
    run_snippets(page, [snippet for snippet in snippets(ROOT / "docs" / page) if snippet.needs in needs], namespace)


def run_snippets(page, found, namespace):
    """Run these snippets of a page, with what stands in for things that this machine lacks."""
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
    assert namespace["logits"].shape[:2] == (1, 1)
    assert namespace["cache"].get_seq_length() == namespace["prompt"].shape[1] + 100
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


def test_experts_in_mxfp4(tmp_path, monkeypatch):
    """A tiny gpt-oss as it is published, in the place of the real one."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads))
    state, experts = model.state_dict(), "model.layers.0.mlp.experts"
    codes = torch.randint(0, 256, (4, 128, 2, 16), dtype=torch.uint8)
    for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        del state[f"{experts}.{name}"]
        state[f"{experts}.{name}_blocks"] = codes[:, :rows].clone()
        state[f"{experts}.{name}_scales"] = torch.full((4, rows, 2), 120, dtype=torch.uint8)
    write(tmp_path / "gpt-oss", state, {"quant_method": "mxfp4"}, **model.config.to_dict())
    namespace = {"QuantizationConfig": QuantizationConfig}
    run("other-formats.md", namespace, "needs the network")
    weight = namespace["model"].model.layers[0].mlp.experts.down_proj
    exact = e2m1_numbers(codes[:, :64].flatten(-2), torch.full((4, 64, 2), 120), torch.float32).mT
    assert (weight.dequantize().cpu() - exact).norm() / exact.norm() < 0.12
    assert namespace["model"](input_ids=torch.arange(5)[None].to(weight.device)).logits.isfinite().all()


def test_a_model_over_several_gpus(hub):
    namespace: dict[str, object] = {}
    run("many-gpus.md", namespace, "needs two GPUs")
    assert namespace["model"].quantization_method == "bigq"


@pytest.fixture
def one_process(monkeypatch):
    """The variables of a process that torchrun has started alone; its process group ends with the test."""
    settings = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in (settings | {"MASTER_PORT": 0}).items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def programs(page):
    """The snippets of a page that need several processes, in groups: each begins with the one that starts processes."""
    groups: list[list[Snippet]] = []
    for snippet in snippets(ROOT / "docs" / page):
        if snippet.needs == "needs several processes":
            if "init_process_group()" in snippet.code:
                groups.append([])
            groups[-1].append(snippet)
    return groups


def trained_by(model):
    ids = torch.arange(6, device=next(model.parameters()).device)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def test_every_program_is_run():
    assert len(programs("many-gpus.md")) == 3


@pytest.mark.parametrize("number", [0, 1], ids=["DDP, then FSDP2", "a load into shards"])
def test_training_in_several_processes(hub, one_process, number, monkeypatch):
    monkeypatch.setattr("bigq.integrations.frozen_shards.SMALLEST", 1024)  # the model of the test is small
    namespace: dict[str, object] = {}
    run_snippets("many-gpus.md", programs("many-gpus.md")[number], namespace)
    trained = trained_by(namespace["model"])
    assert trained
    assert all("lora_" in name for name in trained)


def test_slices_in_several_processes(hub, one_process):
    """Tensor parallel, transformers' way, experts, nodes: each with one process, which has the whole slice."""
    namespace: dict[str, object] = {}
    run_snippets("many-gpus.md", programs("many-gpus.md")[2], namespace)
    with torch.no_grad():
        logits = namespace["model"](torch.arange(6, device=namespace["model"].device)[None]).logits
    whole = transformers.AutoModelForCausalLM.from_pretrained("qwen-moe", quantization_config=namespace["config"])
    with torch.no_grad():
        torch.testing.assert_close(logits, whole(torch.arange(6, device=whole.device)[None]).logits)
    assert namespace["mesh"].mesh_dim_names == ("nodes", "gpus")


def test_experts_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    found = [snippet for snippet in snippets(ROOT / "docs" / "experts.md") if snippet.needs in (None, "needs a GPU")]
    # A cache wants experts in memory that a GPU reads, and there are none on the disk that stands in for it.
    on_gpu = torch.cuda.is_available()
    run_snippets("experts.md", [each for each in found if on_gpu or "cache_experts" not in each.code], namespace)
    model = namespace["model"]
    places = {report.name: report.device for report in model.quantization_report.modules}
    assert places["model.layers.1.mlp.experts"] == ("cpu" if on_gpu else "disk")
    formats = {report.name: report.format for report in model.quantization_report.modules}
    assert formats["model.layers.1.mlp.experts"] == "nf4"
    assert model.generate(torch.arange(4, device=model.device)[None], max_new_tokens=3).shape == (1, 7)
