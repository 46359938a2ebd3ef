"""Stream a checkpoint into any PyTorch model, quantized on the fly: NF4, FP4 and LLM.int8() in Triton."""

from bigq.config import QuantizationConfig
from bigq.errors import BigqError, CheckpointError, ConfigError, PlacementError, UnsupportedError
from bigq.footprint import MemoryFootprint, memory_footprint
from bigq.linear import QuantizedLinear
from bigq.load import load_and_quantize_model
from bigq.materialize import materialize
from bigq.placement import infer_device_map
from bigq.quantize import QuantizedTensor, dequantize_tensor, quantize_tensor
from bigq.report import QuantizationReport

__all__ = [
    "BigqError",
    "CheckpointError",
    "ConfigError",
    "MemoryFootprint",
    "PlacementError",
    "QuantizationConfig",
    "QuantizationReport",
    "QuantizedLinear",
    "QuantizedTensor",
    "UnsupportedError",
    "dequantize_tensor",
    "infer_device_map",
    "load_and_quantize_model",
    "materialize",
    "memory_footprint",
    "quantize_tensor",
]

__version__ = "0.1.0"
