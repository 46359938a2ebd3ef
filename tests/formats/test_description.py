"""The quant_state tensor: fixed size, exact round trip, refusal of anything else."""

import json

import pytest
import torch

from bigq import CheckpointError
from bigq.formats import QUANT_STATE_SPEC, Block4, Description, Int8

DESCRIPTIONS = [
    Description(format=Block4(quant_type="nf4"), shape=(128256, 16384), dtype=torch.bfloat16),
    Description(
        format=Block4(quant_type="fp4", block_size=4096, double_quant=True),
        shape=(128, 28672, 8192),
        dtype=torch.float32,
        compute_dtype=torch.bfloat16,
    ),
    Description(format=Int8(threshold=4.25), shape=(3, 5), dtype=torch.float16),
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda d: d.format.name)
def test_round_trip(description):
    tensor = description.encode()
    assert (tuple(tensor.shape), tensor.dtype) == (QUANT_STATE_SPEC.shape, QUANT_STATE_SPEC.dtype)
    assert Description.decode(tensor, where="here") == description


def tensor_of(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text.ljust(256)), dtype=torch.uint8)


GOOD = json.loads(bytes(DESCRIPTIONS[0].encode().tolist()))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b"\xff\xfe",
        json.dumps({**GOOD, "bigq": 2}).encode(),
        json.dumps({**GOOD, "format": "int3"}).encode(),
        json.dumps({**GOOD, "block_size": 63}).encode(),
        json.dumps({**GOOD, "dtype": "Tensor"}).encode(),
        json.dumps({**GOOD, "dtype": None}).encode(),
        json.dumps({**GOOD, "shape": "wide"}).encode(),
        json.dumps({**GOOD, "surprise": 1}).encode(),
        json.dumps({key: value for key, value in GOOD.items() if key != "shape"}).encode(),
    ],
    ids=lambda text: text[:60].decode(errors="replace"),
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(CheckpointError, match=r"a\.quant_state in f\.safetensors is not a description"):
        Description.decode(tensor_of(text), where="a.quant_state in f.safetensors")
