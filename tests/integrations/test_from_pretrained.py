"""from_pretrained of transformers, with bigq's config: what it returns, saves, loads again and refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import bigq
from bigq import NF4, QuantizationConfig, QuantizedLinear, QuantizedModule

transformers = pytest.importorskip("transformers")
import bigq.integrations.transformers  # noqa: E402 - it needs transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
]
ROOT = Path(__file__).parents[2]
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FORMATS = {
    "nf4": QuantizationConfig("nf4"),
    "fp4": QuantizationConfig("fp4", block_size=32),
    "double": QuantizationConfig("nf4", double_quant=True),
    "int8": QuantizationConfig("int8"),
}
IDS = torch.arange(9)[None]


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**SMALL, "intermediate_size": 96, "tie_word_embeddings": False, "num_key_value_heads": 2, **settings}
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama in float16, as its owner saves it."""
    path = tmp_path_factory.mktemp("llama")
    llama().half().save_pretrained(path)
    return path


def load(path, config=None, kind=None, **settings):
    kind = kind or transformers.AutoModelForCausalLM
    if config is not None:
        settings["quantization_config"] = config
    return kind.from_pretrained(path, **settings)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", FORMATS)
def test_it_has_the_bits_of_a_load_of_ours(folder, name):
    skeleton = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float16
    )
    ours = bigq.load_and_quantize_model(skeleton, folder, FORMATS[name], "cpu")
    assert_same(state(load(folder, FORMATS[name])), state(ours))


def test_what_it_returns_is_ready(folder):
    model = load(folder, QuantizationConfig("nf4", compute_dtype="fp32"))
    assert not model.training
    assert model.dtype == torch.float16
    assert model.is_quantized
    assert model.config.quantization_config == QuantizationConfig("nf4", compute_dtype="fp32", dtype="fp16")
    assert type(model.lm_head) is nn.Linear
    assert model.generation_config.eos_token_id == 2
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 12)
    assert model.num_parameters() == llama().num_parameters()
    assert model.get_memory_footprint() == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def test_dtype_is_that_of_what_stays(folder):
    model = load(folder, FORMATS["nf4"], dtype=torch.float32)
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert load(folder, QuantizationConfig("nf4", dtype="bf16")).model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_it_saves_what_it_loads(folder, tmp_path, name):
    model = load(folder, FORMATS[name])
    expected, before = logits(model), state(model)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bigq"
    again = load(tmp_path / "saved")
    assert_same(state(again), before)
    assert torch.equal(logits(again), expected)
    assert again.config.quantization_config == model.config.quantization_config
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) >= 3
    third = load(tmp_path / "again")
    assert_same(state(third), before)
    skeleton = transformers.AutoModelForCausalLM.from_config(again.config, dtype=torch.float16)
    assert_same(state(bigq.load_and_quantize_model(skeleton, tmp_path / "again", device_map="cpu")), before)


def test_a_model_that_load_and_quantize_model_made_is_saved_as_quantized(folder, tmp_path):
    model = bigq.load_and_quantize_model(llama().half(), None, FORMATS["nf4"], "cpu")
    model.save_pretrained(tmp_path)
    assert_same(state(load(tmp_path)), state(model))


def test_without_bigq_a_saved_folder_is_refused(folder, tmp_path):
    """Also one of weights alone, to which somebody adds the config.json of the model or of the plain one."""
    for name in ("nf4", "int8"):
        model = load(folder, FORMATS[name])
        model.save_pretrained(tmp_path / name)
        Accelerator().save_model(model, tmp_path / f"{name}-weights")
        model.config.save_pretrained(tmp_path / f"{name}-weights")
        (tmp_path / f"{name}-state").mkdir()
        torch.save(model.state_dict(), tmp_path / f"{name}-state" / "pytorch_model.bin")
        shutil.copy(folder / "config.json", tmp_path / f"{name}-state")
        model.model.save_pretrained(tmp_path / f"{name}-base")
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 8
    code = f"""
import transformers
for name in {names}:
    try:
        transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name)
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error), error
    else:
        raise AssertionError(name + " was loaded")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)


def test_the_config_alone_registers_bigq(folder):
    code = f"""
import sys
import bigq
assert "transformers" not in sys.modules
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained({str(folder)!r}, quantization_config=bigq.QuantizationConfig("nf4"))
assert isinstance(model.model.layers[0].mlp.up_proj, bigq.QuantizedLinear)
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'triton_kernels'}", "PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


def test_dequantize_gives_the_plain_model_back(folder, tmp_path):
    model = load(folder, FORMATS["double"])
    expected = {path: m.dequantize() for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    model.save_pretrained(tmp_path / "quantized")  # leaves the dtype as a string in the config
    plain = model.dequantize()
    assert not any(isinstance(module, QuantizedModule) for module in plain.modules())
    assert not plain.is_quantized
    for path, weight in expected.items():
        assert torch.equal(plain.get_submodule(path).weight, weight)
        assert type(plain.get_submodule(path)) is nn.Linear
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same(state(load(tmp_path / "plain")), state(plain))
    assert plain.num_parameters() == llama().num_parameters()


DEVICE_MAPS = {
    "cpu": "cpu",
    "device": torch.device("cpu"),
    "dict": {"": "cpu"},
    "disk": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"},
    "disk-rotary": {"model": "cpu", "model.layers.1": "disk", "lm_head": "disk"},
    "auto": "auto",
}


@pytest.mark.parametrize("name", DEVICE_MAPS)
@pytest.mark.parametrize("format_name", ["nf4", "int8"])
def test_device_maps(folder, tmp_path, name, format_name):
    config = QuantizationConfig(FORMATS[format_name].format, offload="quantized")
    device_map = DEVICE_MAPS[name]
    before = dict(device_map) if isinstance(device_map, dict) else device_map
    model = load(folder, config, device_map=device_map, offload_folder=tmp_path / "offload")
    assert device_map == before
    expected = load(folder, config)
    assert torch.equal(logits(model), logits(expected))
    if "disk" in name:
        assert model.hf_device_map == device_map
        assert model.model.layers[1].mlp.up_proj.weight_packed.device.type == "cpu"
    model.save_pretrained(tmp_path / "saved")
    assert_same(state(load(tmp_path / "saved")), state(expected))


def test_an_automatic_map_keeps_to_its_limits(folder, tmp_path):
    limit = {"cpu": 40_000}
    model = load(folder, FORMATS["nf4"], device_map="auto", max_memory=limit, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model), logits(load(folder, FORMATS["nf4"])))


def test_rules_give_formats_and_are_saved(folder, tmp_path):
    rules = {"lm_head": "int8", "re:.*[kv]_proj": NF4(block_size=32), "model.layers.1": None, "embed_tokens": "int8"}
    model = load(folder, QuantizationConfig("fp4", rules=rules))
    kinds = {name: module.format.name for name, module in model.named_modules() if hasattr(module, "format")}
    assert kinds["lm_head"] == "int8"
    assert model.model.layers[0].self_attn.k_proj.format == NF4(block_size=32)
    assert model.model.layers[1].self_attn.k_proj.format == NF4(block_size=32)  # the first rule wins
    assert kinds["model.layers.0.mlp.up_proj"] == "fp4"
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.embed_tokens, QuantizedModule)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(state(again), state(model))
    assert again.config.quantization_config == model.config.quantization_config
    skeleton = transformers.AutoModelForCausalLM.from_config(again.config, dtype=torch.float16)
    assert_same(state(bigq.load_and_quantize_model(skeleton, tmp_path, None, "cpu")), state(model))


@pytest.mark.parametrize("quantize_head", [False, True], ids=["head-kept", "head-quantized"])
def test_ties_stay(tmp_path, quantize_head):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "plain")
    also = ["embed_tokens"] if quantize_head else []
    model = load(tmp_path / "plain", QuantizationConfig("nf4", also_quantize=also))
    for _ in range(2):
        head, embedding = model.lm_head, model.model.embed_tokens
        if quantize_head:
            assert head.weight_packed is embedding.weight_packed
        else:
            assert head.weight is embedding.weight
        expected = logits(model)
        model.save_pretrained(tmp_path / "saved")
        model = load(tmp_path / "saved")
        assert torch.equal(logits(model), expected)


def test_pickles_and_sharded_files_load(folder, tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    plain.config.save_pretrained(tmp_path)
    (tmp_path / "shards").mkdir()
    plain.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    expected = state(load(folder, FORMATS["nf4"]))
    assert_same(state(load(tmp_path, FORMATS["nf4"])), expected)
    assert_same(state(load(tmp_path / "shards", FORMATS["nf4"])), expected)


def test_a_head_that_the_files_lack_is_initialized(folder, caplog):
    model, info = load(
        folder,
        QuantizationConfig("nf4"),
        transformers.AutoModelForSequenceClassification,
        num_labels=3,
        output_loading_info=True,
    )
    assert info["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert model.score.weight.std() > 0
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_a_linear_that_the_files_lack_is_initialized_and_quantized(folder, tmp_path):
    plain = llama().half()
    gone = "model.layers.1.mlp.up_proj.weight"
    plain.save_pretrained(tmp_path, state_dict={k: v for k, v in plain.state_dict().items() if k != gone})
    model, info = load(tmp_path, FORMATS["int8"], output_loading_info=True)
    assert info["missing_keys"] == {gone}
    weight = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(weight, QuantizedLinear)
    assert 0.01 < weight.dequantize().float().std() < 0.03  # initializer_range is 0.02


def test_shapes_that_differ_are_refused_or_initialized(folder):
    with pytest.raises(bigq.CheckpointError, match=r"lm_head.weight.*expected shape \[80, 64\], found \[64, 64\]"):
        load(folder, FORMATS["nf4"], vocab_size=80)
    model, info = load(folder, FORMATS["nf4"], vocab_size=80, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {name for name, *_ in info["mismatched_keys"]} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert logits(model).shape == (1, 9, 80)


def test_other_loads_of_transformers_are_left_alone(folder):
    assert_same(state(load(folder)), state(llama().half()))


def test_a_saved_config_of_a_folder_with_float_weights_quantizes_them(folder, tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain.config.quantization_config = FORMATS["nf4"].to_dict()
    plain.save_pretrained(tmp_path)
    assert_same(state(load(tmp_path)), state(load(folder, FORMATS["nf4"])))


def test_a_class_of_remote_code_loads(folder, tmp_path):
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM, LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    llama().half().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, FORMATS["nf4"], trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert torch.equal(logits(model), logits(load(folder, FORMATS["nf4"])))


def test_a_bitsandbytes_config_runs_here_if_asked(folder, tmp_path):
    code = f"""
import sys
sys.modules["bitsandbytes"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import bigq
from bigq.integrations.transformers import use_as_bitsandbytes
use_as_bitsandbytes()
asked = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16, llm_int8_skip_modules=["absent"]
)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, quantization_config=asked, device_map="cpu")
config = model.config.quantization_config
assert config.format == bigq.NF4() and config.compute_dtype == torch.float16, config
model.save_pretrained({str(tmp_path)!r})
assert AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).is_quantized
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'triton_kernels'}", "PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


def test_a_trainer_refuses_a_model_without_adapters(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(folder, FORMATS["nf4"])
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, arguments)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    transformers.Trainer(adapted, arguments)


def test_adapters_in_the_folder_are_added(folder, tmp_path):
    peft = pytest.importorskip("peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    model = load(tmp_path, FORMATS["nf4"])
    base = load(folder, FORMATS["nf4"])
    expected = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(load(folder, FORMATS["nf4"])))


def test_a_config_says_what_it_cannot_read():
    with pytest.raises(bigq.ConfigError, match="quant_method is 'awq'"):
        QuantizationConfig.from_dict({"quant_method": "awq", "bits": 4})
    saved = FORMATS["nf4"].to_dict()
    with pytest.raises(bigq.ConfigError, match=r"\['codebook'\] that this bigq does not know"):
        QuantizationConfig.from_dict({**saved, "codebook": 1})


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(NF4(block_size=32, double_quant=True), skip_modules=["a.b"], offload=torch.float32),
        QuantizationConfig("int8", threshold=0.0, compute_dtype="bf16", dtype="fp16", also_quantize=["x"]),
        QuantizationConfig(
            "fp4", skip_defaults=False, keep_in_fp32_modules=["n"], cast_buffers=True, offload="preserve"
        ),
    ],
    ids=lambda config: config.format.name,
)
def test_a_config_survives_json(config):
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("version", [None, "4.57.1"], ids=["absent", "too-old"])
def test_a_transformers_that_does_not_do_is_named(tmp_path, version):
    if version is None:
        fake = "raise ModuleNotFoundError(\"No module named 'transformers'\", name='transformers')"
    else:
        (tmp_path / "transformers" / "quantizers").mkdir(parents=True)
        (tmp_path / "transformers" / "quantizers" / "__init__.py").touch()
        (tmp_path / "transformers" / "quantizers" / "auto.py").touch()
        fake = f"__version__ = {version!r}"
    (tmp_path / "transformers").mkdir(exist_ok=True)
    (tmp_path / "transformers" / "__init__.py").write_text(fake)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'triton_kernels'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", "import bigq; import bigq.integrations.transformers"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "pip install 'transformers>=5.17'" in done.stderr.splitlines()[-1]
