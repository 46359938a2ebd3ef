"""What `bigq` exports, and what importing it does not do."""

import subprocess
import sys
from pathlib import Path

import bigq

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "FP4",
    "NF4",
    "BigqError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "Fit",
    "FusedLinears",
    "InputMoments",
    "Int8",
    "LoadPlan",
    "MemoryFootprint",
    "PlacementError",
    "QuantizationConfig",
    "QuantizationReport",
    "QuantizedCheckpoint",
    "QuantizedLinear",
    "QuantizedModule",
    "QuantizedTensor",
    "QuantizedWeight",
    "UnsupportedError",
    "cache_experts",
    "compare",
    "dequantize",
    "dequantize_tensor",
    "fit",
    "fuse_linears",
    "infer_device_map",
    "input_moments",
    "load_and_quantize_model",
    "materialize",
    "memory_footprint",
    "model_card",
    "num_parameters",
    "plan",
    "quantize_checkpoint",
    "quantize_tensor",
    "save_quantized",
    "unfuse_linears",
}


def test_all_lists_the_public_names():
    assert set(bigq.__all__) == PUBLIC
    assert all(hasattr(bigq, name) for name in bigq.__all__)
    named = {name for name, value in vars(bigq).items() if not name.startswith("_") and not _is_module(value)}
    assert named == PUBLIC


def test_errors_are_one_family():
    for name in PUBLIC:
        if name.endswith("Error"):
            assert issubclass(getattr(bigq, name), bigq.BigqError)
    assert issubclass(bigq.ConfigError, ValueError)
    assert issubclass(bigq.UnsupportedError, RuntimeError)


def test_importing_is_silent_and_lean():
    code = (
        "import sys, bigq, torch;"
        "bad = [m for m in ('triton', 'bigq_kernels', 'transformers', 'bitsandbytes') if m in sys.modules];"
        "assert not bad, bad;"
        "assert not torch.cuda.is_initialized()"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'triton_kernels'}", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_triton_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()


def _is_module(value):
    return type(value).__name__ == "module"
