"""mismatch: a checkpoint and a model that do not fit say by how much, and what may be the cause."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import CheckpointError, PlacementError, QuantizationConfig, load_and_quantize_model
from bigq.planning.mismatch import describe_mismatch

NF4 = QuantizationConfig("nf4")
NAMES = [f"layers.{layer}.{leaf}" for layer in range(12) for leaf in ("up.weight", "up.bias")]


def words(missing=(), unexpected=(), *, model=None, found=0, misfits=(), strict=True):
    return describe_mismatch(
        model or nn.Module(),
        found=found,
        missing={name: f"  {name}: expected" for name in missing},
        misfits=list(misfits),
        unexpected={name: f"  {name}: found" for name in unexpected},
        strict=strict,
    )


def hint(missing, unexpected, **options):
    return words(missing, unexpected, **options).partition("\nhint: ")[2]


def test_nothing_is_said_of_what_fits():
    assert words(found=3) is None
    assert words(unexpected=["more"], found=3, strict=False) is None


def test_a_summary_and_at_most_ten_of_each():
    text = words(NAMES, [f"other.{name}.x" for name in NAMES], misfits=["  a", "  b"])
    lines = text.splitlines()
    assert lines[0] == "the checkpoint does not fit Module: 0 of 24 names match: another model's checkpoint?"
    assert lines[1] == "24 missing from the checkpoint:"
    assert lines[2:12] == [f"  {name}: expected" for name in NAMES[:10]]
    assert lines[12:16] == ["  and 14 more", "2 of the wrong shape or kind:", "  a", "  b"]
    assert lines[16] == "24 unexpected (strict=False ignores them):"
    assert lines[27:] == ["  and 14 more"]


def test_a_summary_of_what_matches():
    assert words(["a"], found=7).splitlines()[0] == "the checkpoint does not fit Module: 7 of 8 names match"


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "_orig_mod."])
@pytest.mark.parametrize("head", [[], ["a_head.weight", "lm_head.weight"]], ids=["alone", "a head sorts first"])
def test_a_prefix_of_either_side(prefix, head):
    longer = sorted([*head, *(prefix + name for name in NAMES)])
    assert hint(NAMES, longer) == f"the checkpoint's names begin with {prefix!r} and the other's do not"
    assert hint(longer, NAMES) == f"the model's names begin with {prefix!r} and the other's do not"


def test_what_torch_compile_puts_inside():
    inside = [name.replace("up", "_orig_mod.up") for name in NAMES]
    assert hint(NAMES, inside) == "the checkpoint's names contain '_orig_mod.' and the other's do not"
    assert hint(inside, NAMES) == "the model's names contain '_orig_mod.' and the other's do not"
    twice = [name.replace("up.", "_orig_mod.up._orig_mod.") for name in NAMES]
    assert "contain '_orig_mod.'" in hint(NAMES, twice)


def test_one_name_that_ends_alike_is_no_prefix():
    assert hint([*NAMES, "weight"], ["conv.weight", *"abcdefgh"]) == ""


def test_a_head_too_many():
    assert hint([], ["lm_head.weight"], found=24).startswith("all that the model needs is there")


@pytest.mark.parametrize("tied", [{"head.bias": "bias"}, [r"head\.bias"]], ids=["names", "patterns"])
def test_a_tie_that_is_not_tied(tied):
    class Tied(nn.Module):
        _tied_weights_keys = tied

        def tie_weights(self):
            pass

    assert hint(["head.bias"], [], model=Tied(), found=24).startswith("model.tie_weights() before the load")
    assert hint(["head.weight"], [], model=Tied(), found=24) == ""


def test_a_tied_bias_of_transformers(empty, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}

    def build():
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=50, **sizes, pad_token_id=1))

    build().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)lm_head\.decoder\.bias.*hint: model\.tie_weights\(\)"):
        load_and_quantize_model(empty(build), tmp_path, NF4, "cpu")
    model = empty(build)
    model.tie_weights()
    assert load_and_quantize_model(model, tmp_path, NF4, "cpu").lm_head.decoder.bias is model.lm_head.bias


def test_a_map_of_another_model(tiny, empty, tmp_path):
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    device_map = {f"layers.{layer}": "cpu" for layer in range(723)}
    with pytest.raises(PlacementError) as caught:
        load_and_quantize_model(empty(tiny), tmp_path, NF4, device_map)
    lines = str(caught.value).splitlines()
    assert lines[1] == "723 of 723 keys name no module or parameter, the map of another model?:"
    assert lines[12] == "  and 713 more"
    assert lines[13].endswith("tensors have no place:")
    assert len(lines) == 1 + 12 + 12


def test_a_checkpoint_of_another_model(tiny, empty, tmp_path):
    save_file({f"{i}.x": torch.ones(2) for i in range(30)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"0 of \d+ names match: another model's checkpoint\?\n") as caught:
        load_and_quantize_model(empty(tiny), tmp_path, NF4, "cpu")
    assert len(str(caught.value).splitlines()) < 26
