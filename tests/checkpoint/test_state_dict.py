"""Where in a pickle the state dict is, and what beside it is refused or ignored."""

from collections import OrderedDict

import pytest
import torch

from bigq.checkpoint import Checkpoint
from bigq.errors import CheckpointError

WEIGHTS = OrderedDict(a=torch.arange(2.0), b=torch.tensor(3), c=torch.ones(2, 3, dtype=torch.bfloat16))
ADAM = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "content, keys",
    [
        pytest.param({"state_dict": WEIGHTS}, "['state_dict']", id="alone"),
        pytest.param({"epoch": 3, "lr": 0.1, "model": WEIGHTS}, "['model']", id="beside numbers"),
        pytest.param({"model": {"module": WEIGHTS}, "args": {"depth": 3}}, "['model']['module']", id="two levels"),
        pytest.param({"model_state_dict": WEIGHTS, "optimizer": ADAM}, "['model_state_dict']", id="beside Adam's"),
        pytest.param(
            {"model": WEIGHTS, "optimizer": {"state": {"layer.weight": {"exp_avg": torch.ones(2)}}}},
            "['model']",
            id="beside the state of an optimizer by names",
        ),
        pytest.param(
            {"state_dict": WEIGHTS, "callbacks": {"best": {"score": torch.tensor(0.5)}}, "loss": torch.tensor(2.0)},
            "['state_dict']",
            id="beside scores and losses",
        ),
        pytest.param(
            {"model": WEIGHTS, "rng": {"cpu": torch.get_rng_state()}, "rng_state": torch.get_rng_state()},
            "['model']",
            id="beside states of generators",
        ),
        pytest.param(WEIGHTS, "", id="flat"),
        pytest.param({"counts": torch.ones(2, dtype=torch.int64), "n": torch.tensor(3)}, "", id="flat, of integers"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_the_one_state_dict_is_found(tmp_path, content, keys, is_zip):
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    checkpoint = Checkpoint.open(path)
    wanted = content if not keys else WEIGHTS
    assert checkpoint.tensors.keys() == wanted.keys()
    assert {stored.where for stored in checkpoint.tensors.values()} == {f"{path}{keys}"}
    for name, tensor in checkpoint.read(wanted):
        assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize(
    "content, named, example",
    [
        ({"model": WEIGHTS, "ema": WEIGHTS}, "'model', 'ema'", "'model'"),
        ({"gan": {"g": WEIGHTS, "d": WEIGHTS}}, "'gan' 'g', 'gan' 'd'", "'gan']['g'"),
        ({**WEIGHTS, "ema": WEIGHTS}, "its top level, 'ema'", "'ema'"),
    ],
    ids=["two", "two in one", "top level and one in it"],
)
def test_among_several_none_is_chosen(tmp_path, content, named, example):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=f"its tensors are under {named}: extract one with") as info:
        Checkpoint.open(tmp_path)
    assert f"weights_only=True)[{example}], 'state_dict.pt')" in str(info.value)


def test_what_is_too_deep_is_no_state_dict(tmp_path):
    torch.save({"a": {"b": {"c": WEIGHTS}}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="'a' is a dict, not a tensor"):
        Checkpoint.open(tmp_path)


def test_what_is_no_tensor_is_ignored_where_unexpected_tensors_are(tmp_path):
    torch.save({"epoch": 3, 4: "x", "config": {"depth": 2}, **WEIGHTS}, tmp_path / "weights.pt")
    message = r"'epoch' is a int, not a tensor, a key is a int.*'config' is a dict.*strict=False ignores"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, strict=False)
    assert list(checkpoint.tensors) == list(WEIGHTS)
    assert torch.equal(checkpoint.get("c"), WEIGHTS["c"])
