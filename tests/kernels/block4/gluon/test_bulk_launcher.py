"""What `linear_4bit_bulk` hands to its kernel; no GPU is needed, since the kernel stands in."""

import pytest
import torch

from bigq.ops import reference
from bigq_kernels.block4.absmax import nested_code
from bigq_kernels.block4.bulk_config import tile_config
from bigq_kernels.block4.gluon import bulk
from bigq_kernels.block4.packed import Packed4
from linear_cases import quantized_4bit


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double-quant"])
def test_the_kernel_gets_scales_that_are_not_nested(nested, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("on a GPU the kernel itself is tested")
    (weight, absmax, nested_absmax, nested_offset), _ = quantized_4bit(128, 1024, "nf4", 64, nested, device)
    given = (nested_absmax, nested_offset, nested_code(device)) if nested else (None, None, None)
    launched = []
    monkeypatch.setattr(bulk, "tile_tokens", lambda x, *_, **__: x)
    monkeypatch.setattr(bulk, "launch", lambda kernel, grid, *args, **settings: launched.append((args, settings)))
    x = torch.randn(17, 1024, device=device).bfloat16()
    packed = Packed4(weight, absmax, given, "nf4", 64)
    bulk.linear_4bit_bulk(x, packed, None, x.new_empty(17, 128), tile_config(32))
    (arguments, settings), scales = launched[0], launched[0][0][2]
    assert len(launched) == 1
    assert arguments[1] is weight
    assert settings["NEW_SCALES"] is nested, "a kernel that starts early must not copy what the one before still writes"
    plain = reference.dequantize_absmax(absmax, nested_absmax, nested_offset) if nested else absmax
    assert scales.dtype == torch.float32
    assert torch.equal(scales, plain)
