"""A tiny Llama in a folder, which the tests of this folder compare with what becomes of it."""

import pytest
import torch


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """One of 96 token ids and tied embeddings, in float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype="float32",
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
