"""The quant_state tensor: fixed size, exact round trip, refusal of anything else."""

import json

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


GOOD = json.loads(bytes(encode_quant_state({"weight": DESCRIPTIONS[0]}).tolist()))


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
        json.dumps({**GOOD, "transposed": 1}).encode(),
        json.dumps({key: value for key, value in GOOD.items() if key != "shape"}).encode(),
    ],
    ids=lambda text: text[:60].decode(errors="replace"),
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(CheckpointError, match=r"a\.quant_state in f\.safetensors is not a description"):
        decode_quant_state(tensor_of(text), "a.quant_state in f.safetensors")


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
