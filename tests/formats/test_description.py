"""The quant_state tensor: fixed size, exact round trip, refusal of anything else."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bigq import CheckpointError, UnsupportedError
from bigq.formats import (
    FP4,
    NF4,
    Description,
    Int8,
    check_quant_state,
    decode_quant_state,
    encode_quant_state,
    quant_state_spec,
)

DESCRIPTIONS = [
    Description(format=NF4(), shape=(128256, 16384), dtype=torch.bfloat16),
    Description(
        format=FP4(block_size=4096, double_quant=True),
        shape=(128, 28672, 8192),
        dtype=torch.float32,
        compute_dtype=torch.bfloat16,
    ),
    Description(format=Int8(threshold=4.25), shape=(3, 5), dtype=torch.float16),
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda d: d.format.name)
def test_round_trip(description):
    tensor = encode_quant_state({"weight": description})
    spec = quant_state_spec(1)
    assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype) == ((256,), torch.uint8)
    assert decode_quant_state(tensor, "here") == {"weight": description}


def test_round_trip_of_several_weights_and_of_transposed_ones():
    weights = {f"w{i}": description for i, description in enumerate(DESCRIPTIONS)}
    weights["w3"] = Description(format=NF4(), shape=(5, 3), dtype=torch.float32, transposed=True)
    tensor = encode_quant_state(weights)
    assert (tuple(tensor.shape), tensor.dtype) == ((4 * 256,), torch.uint8)
    assert decode_quant_state(tensor, "here") == weights
    assert list(decode_quant_state(tensor, "here")) == list(weights)
    assert weights["w3"].weight_shape == (3, 5)


def tensor_of(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text.ljust(256)), dtype=torch.uint8)


GOOD, INT8 = (json.loads(bytes(encode_quant_state({"weight": DESCRIPTIONS[i]}).tolist())) for i in (0, 2))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b"\xff\xfe",
        json.dumps({**GOOD, "bigq": 1}).encode(),
        json.dumps({**GOOD, "format": "int3"}).encode(),
        json.dumps({**GOOD, "block_size": 63}).encode(),
        json.dumps({**GOOD, "dtype": "Tensor"}).encode(),
        json.dumps({**GOOD, "dtype": None}).encode(),
        json.dumps({**GOOD, "shape": "wide"}).encode(),
        json.dumps({**GOOD, "surprise": 1}).encode(),
        json.dumps({**GOOD, "leaf": "a.weight"}).encode(),
        json.dumps({**GOOD, "leaf": ""}).encode(),
        json.dumps({**GOOD, "leaf": ["weight"]}).encode(),
        json.dumps({**GOOD, "transposed": 1}).encode(),
        json.dumps({**GOOD, "bigq": 2.0}).encode(),
        json.dumps({**GOOD, "format": ["nf4"]}).encode(),
        json.dumps({**GOOD, "name": "nf4"}).encode(),
        json.dumps({**GOOD, "self": 1}).encode(),
        json.dumps({**GOOD, "block_size": 32.0}).encode(),
        json.dumps({**GOOD, "block_size": True}).encode(),
        json.dumps({**GOOD, "double_quant": 0}).encode(),
        json.dumps({**GOOD, "double_quant": ""}).encode(),
        json.dumps({**GOOD, "dtype": ["float32"]}).encode(),
        json.dumps({**GOOD, "dtype": "int8"}).encode(),
        json.dumps({**GOOD, "dtype": "torch.float32"}).encode(),
        json.dumps({**GOOD, "compute_dtype": "int64"}).encode(),
        json.dumps({**GOOD, "compute_dtype": "float8_e4m3fn"}).encode(),
        json.dumps({**GOOD, "compute_dtype": {}}).encode(),
        json.dumps({**GOOD, "shape": [8.0, 8]}).encode(),
        json.dumps({**GOOD, "shape": [True, 8]}).encode(),
        json.dumps({**GOOD, "shape": [-8, 8]}).encode(),
        json.dumps(GOOD).replace('"leaf"', '"shape": [3], "leaf"').encode(),
        json.dumps({**INT8, "threshold": True}).encode(),
        json.dumps({**INT8, "threshold": "6"}).encode(),
        json.dumps({**INT8, "threshold": -1}).encode(),
        json.dumps({**INT8, "threshold": float("inf")}).encode(),
        json.dumps({**INT8, "threshold": 0}).replace('"threshold": 0', '"threshold": 1e999').encode(),
        b"[" * 256,
        json.dumps({key: value for key, value in GOOD.items() if key != "shape"}).encode(),
    ],
    ids=lambda text: text[:60].decode(errors="replace"),
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(CheckpointError, match=r"a\.quant_state in f\.safetensors is not a description"):
        decode_quant_state(tensor_of(text), "a.quant_state in f.safetensors")


def test_the_record_that_the_refused_ones_differ_from_is_read():
    for fields in (GOOD, INT8):
        assert len(json.dumps(fields)) <= 256
        assert list(decode_quant_state(tensor_of(json.dumps(fields).encode()), "here")) == ["weight"]


def test_no_module_is_imported_because_a_record_names_it():
    """torch imports some of its modules when they are asked for by name."""
    code = f"""
import sys, torch
from bigq import CheckpointError
from bigq.formats import decode_quant_state
before = set(sys.modules)
for field in ("dtype", "compute_dtype", "format"):
    record = __import__("json").dumps({{**{GOOD!r}, field: "_inductor"}}).encode().ljust(256)
    try:
        decode_quant_state(torch.tensor(list(record), dtype=torch.uint8), "here")
    except CheckpointError:
        continue
    sys.exit(field)
assert not [name for name in set(sys.modules) - before if name.startswith("torch._inductor")]
"""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)


def test_a_refusal_is_short_whatever_the_record_holds():
    record = json.dumps({**GOOD, "dtype": [[[["\x00" * 9] * 2] * 2]]}).encode()
    with pytest.raises(CheckpointError) as info:
        decode_quant_state(tensor_of(record), "here")
    assert len(str(info.value)) < 400


def test_a_leaf_that_is_described_twice_is_refused():
    record = encode_quant_state({"weight": DESCRIPTIONS[0]})
    with pytest.raises(CheckpointError, match=r"here is not a description.*'weight' twice"):
        decode_quant_state(record.repeat(2), "here")


@pytest.mark.parametrize(
    "shape, dtype",
    [((0,), torch.uint8), ((255,), torch.uint8), ((2, 256), torch.uint8), ((), torch.uint8), ((256,), torch.int8)],
    ids=str,
)
def test_a_tensor_that_cannot_be_a_description_is_refused_by_its_looks(shape, dtype):
    with pytest.raises(CheckpointError, match=r"here is not a description.*expected uint8, 256 bytes a weight, got"):
        check_quant_state(shape, dtype, "here")


def test_a_description_that_does_not_fit_is_refused_and_not_cut():
    with pytest.raises(UnsupportedError, match=r"takes 3\d\d bytes in a checkpoint; there is room for 256"):
        encode_quant_state({"weight" * 30: DESCRIPTIONS[0]})
