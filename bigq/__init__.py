"""Stream a checkpoint into any PyTorch model, quantized on the fly: NF4, FP4 and LLM.int8() in Triton."""

from bigq.calibration.fit import fit
from bigq.calibration.fit_result import Fit
from bigq.calibration.input_moments import input_moments
from bigq.config import QuantizationConfig
from bigq.converting.quantize_checkpoint import QuantizedCheckpoint, quantize_checkpoint
from bigq.dry_run.load_plan import LoadPlan
from bigq.dry_run.plan import plan
from bigq.errors import BigqError, CheckpointError, ConfigError, PlacementError, UnsupportedError
from bigq.evaluation.compare import compare
from bigq.evaluation.comparison import Comparison
from bigq.footprint import MemoryFootprint, memory_footprint, num_parameters
from bigq.formats import FP4, NF4, InputMoments, Int8
from bigq.infer_device_map import infer_device_map
from bigq.interop.adapter_merges import watch_adapters as _watch_adapters
from bigq.load import load_and_quantize_model
from bigq.loading.dequantize import dequantize
from bigq.loading.report import QuantizationReport
from bigq.model_card import model_card
from bigq.offload.cache_experts import cache_experts
from bigq.offload.materialize import materialize
from bigq.quantize import QuantizedTensor, dequantize_tensor, quantize_tensor
from bigq.saving.save_quantized import save_quantized
from bigq.weight.fuse_linears import FusedLinears, fuse_linears, unfuse_linears
from bigq.weight.linear import QuantizedLinear
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.quantized_weight import QuantizedWeight

__all__ = [
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
]

__version__ = "0.1.0"

_watch_adapters()
