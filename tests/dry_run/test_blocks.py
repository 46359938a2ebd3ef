"""How wide the linears of a block are, without a forward pass."""

import pytest
import torch

from bigq.dry_run.blocks import find_blocks

transformers = pytest.importorskip("transformers")


def test_experts_that_are_held_transposed_have_the_widths_of_linears():
    sizes = {"hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 96, "head_dim": 16, "vocab_size": 100}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, **more, pad_token_id=0))
    found = {linear.name: linear for part in find_blocks(model)[0].parts for linear in part if linear.experts > 1}
    assert {(name.rpartition(".")[2], one.n, one.k) for name, one in found.items()} == {
        ("gate_up_proj", 64, 64),
        ("down_proj", 64, 32),
    }
