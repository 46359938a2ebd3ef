"""InputMoments: what they hold and refuse, their file, and the importance that a search makes of them."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file

from bigq import CheckpointError, ConfigError, InputMoments
from bigq.formats import importance_of


def test_they_are_a_mapping_of_copies():
    given = {"a.weight": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.ones(3).bfloat16()}
    moments = InputMoments(given, unreached=["c"])
    given["a.weight"][0] = 9
    assert list(moments) == ["a.weight", "b"]
    assert moments["a.weight"].tolist() == [1.0, 2.0]
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    assert (len(moments), moments.unreached, repr(moments)) == (2, ("c",), "InputMoments(2 weights, 1 not reached)")
    assert moments == moments
    assert moments != copy.deepcopy(moments)


def test_a_file_holds_all_of_them(tmp_path):
    moments = InputMoments({"a.weight": torch.rand(5), "b.weight": torch.tensor([0.0, 1e38])}, unreached=["c", "d"])
    moments.save(tmp_path / "m.safetensors")
    again = InputMoments.load(str(tmp_path / "m.safetensors"))
    assert list(again) == list(moments)
    assert again.unreached == moments.unreached
    assert all(torch.equal(again[name], moments[name]) for name in moments)
    with pytest.raises(OSError, match="cannot be written"):
        moments.save(tmp_path / "none" / "m.safetensors")


def test_other_files_are_refused(tmp_path):
    save_file({"a.weight": torch.ones(3)}, tmp_path / "weights.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x10")
    save_file({"a": -torch.ones(3)}, tmp_path / "negative.safetensors", {"kind": "bigq input moments"})
    for name, message in [
        ("weights", "holds no input moments; expected a file that InputMoments.save wrote"),
        ("short", "cannot be read as input moments"),
        ("absent", "cannot be read as input moments"),
        ("negative", "holds damaged input moments: a: moments are negative"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            InputMoments.load(tmp_path / f"{name}.safetensors")


def test_what_is_no_moment_is_refused():
    for tensor, message in [
        (torch.ones(2, 2), r"a: moments are torch.float32 \[2, 2\]; expected floating point \[K\]"),
        (torch.ones(2, dtype=torch.int64), r"a: moments are torch.int64 \[2\]"),
        ([1.0], "a: moments are list"),
        (torch.tensor([1.0, math.nan, -1.0]), r"a: .* at 2 of 3 input features \(1, 2\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            InputMoments({"a": tensor})


def test_importance_has_a_mean_of_one_and_ends():
    assert importance_of(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]
    moments = torch.ones(100_000)
    moments[0] = 1e12
    importance = importance_of(moments)
    assert (importance.dtype, importance.max().item()) == (torch.float32, pytest.approx(1e4))
    assert importance[1:].unique().tolist() == [pytest.approx(1e-4)]
    assert importance_of(torch.zeros(3)).unique().tolist() == [pytest.approx(1e-4)]
    assert importance_of(torch.full((3,), 3e38)).tolist() == [1.0] * 3
    assert importance_of(torch.ones(0)).shape == (0,)
