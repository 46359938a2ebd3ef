"""as_batches: the user's batches or random ids, on the model's device."""

import pytest
import torch
from torch import nn

from bigq import ConfigError, QuantizationConfig, load_and_quantize_model
from bigq.calibration.batches import as_batches, device_of


class Words(nn.Module):
    """A language model without a config, as minGPT is: learned positions, and the longest input in an attribute."""

    def __init__(self, block_size=1000):
        super().__init__()
        self.block_size = block_size
        self.positions, self.words = nn.Embedding(1000, 32), nn.Embedding(17, 32)
        self.head = nn.Linear(32, 17)

    def forward(self, ids):
        hidden = self.positions(torch.arange(ids.shape[1], device=ids.device)[None]) + self.words(ids)
        return self.head(hidden)


def test_random_ids_are_of_the_vocabulary_and_as_long_as_the_model_takes():
    model = Words()
    ids = torch.cat([batch.args[0] for batch in as_batches(model)])
    assert ids.shape == (8, 256)
    assert set(ids.unique().tolist()) == set(range(17))
    assert as_batches(Words(block_size=10))[0].args[0].shape == (8, 10)
    split = as_batches(model, rows=1)
    assert [batch.args[0].shape for batch in split] == [(1, 256)] * 8
    assert torch.equal(torch.cat([batch.args[0] for batch in split]), ids)
    assert torch.equal(as_batches(model)[0].args[0], ids)
    assert not torch.equal(as_batches(model, seed=1)[0].args[0], ids)
    assert split[3].call(model).shape == (1, 256, 17)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_quantized_embedding_says_its_rows():
    config = QuantizationConfig("int8", also_quantize=["words"])
    model = load_and_quantize_model(Words(), None, config, device_map="cpu")
    assert as_batches(model)[0].args[0].max() == 16


def test_random_ids_of_transformers_models():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=77, max_position_embeddings=40, **sizes))
    assert as_batches(bert)[0].args[0].shape == (8, 40)
    assert 2 < as_batches(bert)[0].args[0].max() < 77
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    (batch,) = as_batches(t5)
    assert {name: tuple(ids.shape) for name, ids in batch.kwargs.items()} == {
        "input_ids": (8, 256),
        "decoder_input_ids": (8, 256),
    }
    assert batch.call(t5).logits.shape == (8, 256, 50)
    config = transformers.ViTConfig(image_size=32, patch_size=16, **sizes)
    with pytest.raises(ConfigError, match=r"(?s)ViTModel could not be called with token ids alone.*pass batches="):
        as_batches(transformers.ViTModel(config))


def test_batches_are_the_arguments_of_calls():
    model, ids, mask = Words(), torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    found = as_batches(model, [ids, {"input_ids": ids, "names": ["a"]}, (ids, mask), [ids, {"mask": mask}]])
    assert [len(batch.args) for batch in found] == [1, 0, 2, 2]
    assert torch.equal(found[0].args[0], ids)
    assert torch.equal(found[1].kwargs["input_ids"], ids)
    assert found[1].kwargs["names"] == ["a"]
    assert torch.equal(found[3].args[1]["mask"], mask)
    assert as_batches(model, iter([ids]))[0].call(model).shape == (1, 2, 17)


@pytest.mark.parametrize(
    "batches, message",
    [
        (torch.ones(2, 3), r"batches is a tensor torch.float32 \[2, 3\]; expected a list of batches"),
        ({"input_ids": torch.ones(1)}, "batches is .*; expected a list of batches"),
        ("Once", "batches is 'Once'; expected a list"),
        (3, "batches is 3; expected a list"),
        ([], "batches is empty"),
        (["Once"], "batch 0 is 'Once'; expected a tensor"),
        ([torch.ones(1), [1, 2]], r"batch 1 is \[1, 2\]; expected a tensor"),
        ([()], r"batch 0 is \(\)"),
    ],
    ids=["tensor", "mapping", "text", "number", "none", "text-in-it", "numbers-in-it", "no-arguments"],
)
def test_what_is_no_list_of_batches_is_refused(batches, message):
    with pytest.raises(ConfigError, match=message):
        as_batches(Words(), batches)


def test_a_model_without_token_ids_needs_batches():
    with pytest.raises(ConfigError, match=r"(?s)Linear could not be called with token ids alone.*pass batches="):
        as_batches(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"Identity has no nn.Embedding that takes token ids"):
        as_batches(nn.Identity())


def test_the_device_is_that_of_the_hook_or_of_the_first_tensor():
    model = Words()
    assert device_of(model) == torch.device("cpu")
    assert device_of(nn.ReLU()) == torch.device("cpu")
    with torch.device("meta"):
        assert device_of(Words()) == torch.device("cpu")
    hooked = load_and_quantize_model(model, None, QuantizationConfig("nf4"), device_map={"": "cpu", "words": "disk"})
    assert device_of(hooked) == torch.device("cpu")
    assert as_batches(hooked)[0].call(hooked).shape == (8, 256, 17)


@pytest.mark.gpu
def test_batches_come_to_the_gpu_of_an_offloaded_model():
    model = load_and_quantize_model(Words(), None, QuantizationConfig("nf4"), device_map={"": 0, "words": "cpu"})
    (batch,) = as_batches(model)
    assert batch.args[0].device == torch.device("cuda", 0)
    assert batch.call(model).device == torch.device("cuda", 0)
