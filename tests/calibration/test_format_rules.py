"""with_formats: few rules that say exactly what was chosen."""

import random

import pytest

from bigq import NF4, Int8, QuantizationConfig
from bigq.calibration.format_rules import with_formats
from bigq.config import REGEX
from bigq.model.patterns import matches

SMALL, LARGE = NF4(), Int8()
ROLES = ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


def llama(layers=12):
    return [f"model.layers.{layer}.{role}.weight" for layer in range(layers) for role in ROLES]


def given(config, names):
    """The format of each of `names` by the rules of a config."""
    first = {n: next((f for p, f in config.ordered_rules() if matches(p, n)), config.weight_format()) for n in names}
    return first


def written(formats, config=None):
    config = config or QuantizationConfig("nf4")
    return with_formats(config, formats, lambda tried: given(tried, formats) == formats)


def test_all_layers_of_a_role_are_one_short_rule():
    formats = {name: LARGE if "v_proj" in name else SMALL for name in llama()}
    assert written(formats).ordered_rules() == (("v_proj", LARGE),)


def test_some_layers_of_a_role_are_one_list_of_numbers():
    chosen = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1, 11)}
    formats = {name: LARGE if name in chosen else SMALL for name in llama()}
    assert written(formats).ordered_rules() == ((r"re:model\.layers\.(0|1|11)\.mlp\.down_proj", LARGE),)


def test_most_layers_of_a_role_are_a_rule_after_its_exceptions():
    formats = {
        name: (SMALL if ".3." in name else LARGE) if "k_proj" in name else None if ".7.mlp" in name else SMALL
        for name in llama()
    }
    assert written(formats).ordered_rules() == (
        ("model.layers.3.self_attn.k_proj", SMALL),
        ("k_proj", LARGE),
        ("model.layers.7.mlp.down_proj", None),
    )


def test_the_format_of_most_weights_becomes_that_of_the_config():
    formats = {name: SMALL if "v_proj" in name else LARGE for name in llama()}
    config = written(formats, QuantizationConfig("fp4", compute_dtype="bf16", skip_modules=["lm_head"]))
    assert config.weight_format() == LARGE
    assert config.ordered_rules() == (("v_proj", SMALL),)
    assert (str(config.compute_dtype), config.skip_modules) == ("torch.bfloat16", ("lm_head",))


def test_rules_of_the_user_come_first():
    config = QuantizationConfig("nf4", rules={"lm_head": "int8"})
    formats = {name: LARGE if "v_proj" in name else SMALL for name in llama()}
    assert written(formats, config).ordered_rules() == (("lm_head", LARGE), ("v_proj", LARGE))


@pytest.mark.parametrize(
    "names",
    [
        llama(),
        ["0.weight", "1.0.weight", "1.2.weight", "2.weight"],
        [f"blocks.{block}.experts.{expert}.up.weight" for block in range(3) for expert in range(4)],
        ["weight", "a.weight", "b.a.weight", "a.0", "a.up"],
    ],
    ids=["llama", "sequential", "experts", "odd-names"],
)
def test_any_choice_is_written_exactly(names):
    rng = random.Random(0)
    for _ in range(50):
        formats = {name: rng.choice([SMALL, SMALL, LARGE, None]) for name in names}
        if set(formats.values()) == {None}:
            continue
        config = written(formats)
        assert given(config, names) == formats
        assert QuantizationConfig.from_dict(config.to_dict()) == config


def test_a_rule_that_says_too_much_is_written_out():
    """The caller refuses the short ones, which quantize something that is kept otherwise."""
    formats = {name: LARGE if "v_proj" in name else SMALL for name in llama(2)}

    def is_right(config):
        return all(pattern.startswith(REGEX) for pattern, _ in config.ordered_rules())

    rules = with_formats(QuantizationConfig("nf4"), formats, is_right).ordered_rules()
    assert rules == tuple((rf"re:model\.layers\.{layer}\.self_attn\.v_proj\.weight", LARGE) for layer in (0, 1))
