"""torch's default dtype, which models and their users set, reaches no table and no sum of the Gluon kernels."""

from dataclasses import replace

import pytest
import torch

from bigq_kernels.block4.configs import SlicedConfig, staged_config
from bigq_kernels.gpu import Gpu
from linear_cases import packed4, quantized_4bit

SLICED = SlicedConfig(block_m=8, warps=16, covers=1, split=2, stages=3, flush=2, programs=132, registers=128)


@pytest.fixture
def _bfloat16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def launched(module, name, monkeypatch, *others):
    """The tensors that a launcher of `module` gives its first kernel, which does not run."""
    pytest.importorskip("triton.experimental.gluon")
    seen = []
    monkeypatch.setattr(
        module, "launch", lambda kernel, grid, *args, **_: seen.append(dict(zip(kernel.arg_names, args, strict=False)))
    )
    for adds in ("add_parts_of_tiles", "add_parts_of_rows"):
        monkeypatch.setattr(module, adds, lambda *_: None, raising=False)
    n, k = 32, 8192
    tensors, _ = quantized_4bit(n, k, "nf4", 64, False, torch.device("cpu"))
    x, out = torch.ones(2, k, dtype=torch.float16), torch.empty(2, n, dtype=torch.float16)
    getattr(module, name)(x, packed4(tensors, "nf4", 64), None, out, *others)
    return seen[0]


@pytest.mark.usefixtures("_bfloat16_by_default")
def test_parts_are_float32(monkeypatch):
    sliced = pytest.importorskip("bigq_kernels.block4.gluon.sliced")
    staged = pytest.importorskip("bigq_kernels.block4.gluon.staged")
    config = replace(staged_config(Gpu.named("h200"), 8, 32, 8192), programs=3)
    for module, name, *others in (
        (sliced, "linear_4bit_sliced", SLICED),
        (staged, "linear_4bit_staged", config),
    ):
        partial = launched(module, name, monkeypatch, *others)["partial_ptr"]
        assert partial.dtype == torch.float32
        assert partial.numel()


@pytest.mark.usefixtures("_bfloat16_by_default")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tables_hold_the_code(quant_type):
    table = pytest.importorskip("bigq_kernels.block4.gluon.table")
    code = (table.NF4_CODE if quant_type == "nf4" else table.FP4_CODE).value
    table.code_tables.cache_clear()
    planes = torch.tensor(table.code_tables(quant_type, torch.float16), dtype=torch.int32).view(torch.uint8).view(2, 16)
    values = planes.mT.contiguous().view(torch.float16).flatten()
    assert values.tolist() == torch.tensor(code, dtype=torch.float32).half().tolist()
