"""Mutated files of bitsandbytes are refused by bigq, or load as what they then say."""

import importlib.util
import random
import warnings
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import init_empty_weights
from torch import nn

from bigq import FP4, NF4, BigqError, Int8, QuantizedLinear, load_and_quantize_model
from bigq.formats import Description
from bigq.formats.bitsandbytes import bitsandbytes_tensors

_SPEC = importlib.util.spec_from_file_location("fuzz_checkpoints", Path(__file__).with_name("fuzz_checkpoints.py"))
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)

FORMATS = {"nf4": NF4(block_size=32), "fp4-double": FP4(block_size=32, double_quant=True), "int8": Int8()}
DTYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]
CASES = 100  # of each format


def build():
    return nn.Sequential(nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 3))


@cache
def stored(name):
    """The tensors of a model whose first linear bitsandbytes has quantized."""
    torch.manual_seed(0)
    tensors = dict(build().state_dict())
    weight = tensors.pop("0.weight")
    described = Description(format=FORMATS[name], shape=(4, 64), dtype=torch.float32)
    return tensors | bitsandbytes_tensors("0.weight", described, FORMATS[name].quantize(weight))


def mutated(tensors, rng):
    """A file in which a tensor, the JSON of the weight or the header is another."""
    tensors = dict(tensors)
    name = rng.choice([name for name in tensors if name.startswith("0.")])
    described = [name for name in tensors if "bitsandbytes__" in name]
    match rng.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensors[name].to(rng.choice(DTYPES))
        case 2:
            tensors[name] = tensors[name].flatten()[: rng.randrange(tensors[name].numel() + 1)].clone()
        case 3:
            tensors[name] = torch.cat([tensors[name].flatten(), tensors[name].flatten()[: rng.choice((1, 2, 99))]])
        case 4:
            tensors[rng.choice([*tensors, "0.weight_packed", "0.quant_state", "1.SCB", "SCB"])] = tensors.pop(name)
        case 5 | 6 if described:
            text = bytes(tensors[described[0]].tolist())
            content = fuzz.json.loads(text)
            text = fuzz.mutated_json(content, rng) if rng.random() < 0.7 else fuzz.mutated_bytes(text, rng)
            tensors[described[0]] = torch.tensor(list(text), dtype=torch.uint8)
        case _:
            return fuzz._with_header(safetensors.torch.save(tensors), rng)
    return safetensors.torch.save(tensors)


def flat_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def outcome(path, content, strict):
    """ "refused" or "loaded"; anything else raises."""
    with init_empty_weights():
        model = build()
    refusal = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* are dequantized")
            load_and_quantize_model(model, path, None, "cpu", strict=strict, progress=False)
    except BigqError as error:
        refusal = str(error)
    if refusal is not None:
        assert 0 < len(refusal) < fuzz.LONGEST_MESSAGE
        assert all(tensor.is_meta for tensor in model.parameters())
        return "refused"
    held = safetensors.torch.load(content)
    linear = model[0]
    if isinstance(linear, QuantizedLinear):
        packed = flat_bytes(linear.weight_packed)
        assert torch.equal(packed, flat_bytes(held["0.weight"]))
        scales = flat_bytes(linear.weight_absmax)
        assert torch.equal(scales, flat_bytes(held.get("0.SCB", held.get("0.weight.absmax")))[: len(scales)])
    return "loaded"


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_refused_or_loads_as_what_it_says(tmp_path, name):
    outcomes = []
    for number in range(CASES):
        rng = random.Random(f"{name} {number}")
        content = mutated(stored(name), rng)
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        try:
            outcomes.append(outcome(path, content, strict=rng.random() < 0.7))
        except Exception as error:
            raise AssertionError(f"case {number}") from error
    assert {"refused", "loaded"} == set(outcomes)
