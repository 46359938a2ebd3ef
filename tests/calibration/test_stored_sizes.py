"""stored_sizes: the bytes of each weight are those that a load stores."""

import pytest
import torch
from torch import nn

import bigq
from bigq.calibration.stored_sizes import stored_sizes
from bigq.model.tree import ModelTree

FORMATS = (bigq.NF4(), bigq.NF4(block_size=32, double_quant=True), bigq.Int8(), None)


def loaded_nbytes(model, config):
    return bigq.memory_footprint(bigq.load_and_quantize_model(model, None, config, "cpu")).total_nbytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own dtype", "bfloat16"])
def test_a_load_stores_as_much(tiny, dtype):
    config = bigq.QuantizationConfig("nf4", dtype=dtype)
    sizes = stored_sizes(ModelTree(tiny()), config, FORMATS)
    assert list(sizes.weights) == [f"blocks.{b}.{name}.weight" for b in range(3) for name in ("up", "down")]
    assert set(sizes.numel.values()) == {3 * 72 * 72}
    for at, found in enumerate(FORMATS[:-1]):
        every = sizes.other_nbytes + sum(own[at].nbytes for own in sizes.weights.values())
        assert every == loaded_nbytes(tiny(), bigq.QuantizationConfig(found, dtype=dtype))
    rules = {"blocks.1.up": "nf4", "blocks": None}
    one = sizes.other_nbytes + sum(own[3].nbytes for own in sizes.weights.values())
    one += sizes.weights["blocks.1.up.weight"][0].nbytes - sizes.weights["blocks.1.up.weight"][3].nbytes
    assert one == loaded_nbytes(tiny(), bigq.QuantizationConfig("nf4", rules=rules, dtype=dtype))


def test_descriptions_are_no_numbers():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(64, 8))
    (nf4, int8, kept), *_ = stored_sizes(
        ModelTree(model), bigq.QuantizationConfig("nf4"), (bigq.NF4(), bigq.Int8(), None)
    ).weights.values()
    assert (nf4.numbers_nbytes, nf4.nbytes) == (8 * 32 + 8 * 4, 8 * 32 + 8 * 4 + 256)
    assert (int8.numbers_nbytes, int8.nbytes) == (8 * 64 + 8 * 4, 8 * 64 + 8 * 4 + 256)
    assert (kept.numbers_nbytes, kept.nbytes) == (4 * 512, 4 * 512)


def test_weights_with_a_rule_are_not_chosen_for(tiny):
    rules = {"re:blocks.0.*": "int8", "head": "nf4", "blocks.1.up": None}
    config = bigq.QuantizationConfig("nf4", rules=rules)
    sizes = stored_sizes(ModelTree(tiny()), config, FORMATS)
    assert list(sizes.weights) == ["blocks.1.down.weight", "blocks.2.up.weight", "blocks.2.down.weight"]
    assert sizes.fixed == {
        "blocks.0.up.weight": bigq.Int8(),
        "blocks.0.down.weight": bigq.Int8(),
        "head.weight": bigq.NF4(),
    }
    kept = sizes.other_nbytes + sum(own[3].nbytes for own in sizes.weights.values())
    assert kept == loaded_nbytes(tiny(), bigq.QuantizationConfig(None, rules=rules))
    with pytest.raises(bigq.ConfigError, match="the rules of the config give every weight a format"):
        stored_sizes(ModelTree(tiny()), bigq.QuantizationConfig("nf4", rules={"blocks": "int8"}), FORMATS)


def test_the_only_weight_of_a_model_is_not_kept():
    sizes = stored_sizes(ModelTree(nn.Linear(64, 8)), bigq.QuantizationConfig("nf4"), FORMATS)
    assert sizes.formats == FORMATS[:-1]


def test_a_tied_weight_counts_once_with_all_descriptions(tiny):
    config = bigq.QuantizationConfig("nf4", also_quantize=["head"])
    sizes = stored_sizes(ModelTree(tiny(tied=True)), config, FORMATS)
    assert sizes.weights["embed.weight"][0].nbytes == sizes.weights["embed.weight"][0].numbers_nbytes + 2 * 256
    every = sizes.other_nbytes + sum(own[0].nbytes for own in sizes.weights.values())
    assert every == loaded_nbytes(tiny(tied=True), config)
