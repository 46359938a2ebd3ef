"""A sample of the fuzzer's cases, and that it tells right from wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch

_SPEC = importlib.util.spec_from_file_location("fuzz_checkpoints", Path(__file__).with_name("fuzz_checkpoints.py"))
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)

_CASES = 40  # of each kind


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:Detected pickle protocol")  # torch's, of what a case holds
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_mutated_checkpoint_is_refused_or_loads_as_what_it_says(kind):
    first, kinds = fuzz.KINDS.index(kind), len(fuzz.KINDS)
    outcomes = [outcome for _, _, outcome in fuzz.run(range(first, kinds * _CASES, kinds))]
    assert [outcome for outcome in outcomes if outcome not in ("refused", "loaded")] == []
    assert "refused" in outcomes


def test_another_number_is_a_finding(tmp_path):
    rng = fuzz.random.Random(0)
    path = tmp_path / "m.bin"
    torch.save(fuzz.weights(), path)
    assert fuzz.check("zip", path, fuzz.weights, rng) == "loaded"
    other = {name: tensor + 1 for name, tensor in fuzz.weights().items()}
    with pytest.raises(AssertionError, match="weight"):
        fuzz.check("zip", path, lambda: other, rng)
