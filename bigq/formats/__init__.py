"""Weight formats: a frozen dataclass for each, and the description that is saved with a weight."""

from bigq.formats.base import METHODS, Format, Product, Rows, State, TensorSpec
from bigq.formats.block4 import BLOCK_SIZES, FP4, NF4, Block4
from bigq.formats.int8 import Int8
from bigq.formats.moments import InputMoments, importance_of
from bigq.formats.quant_state import (
    QUANT_STATE,
    Description,
    check_quant_state,
    decode_quant_state,
    dtype_name,
    encode_quant_state,
    quant_state_spec,
    state_name,
)
from bigq.formats.registry import FORMATS, make_format

__all__ = [
    "BLOCK_SIZES",
    "FORMATS",
    "FP4",
    "METHODS",
    "NF4",
    "QUANT_STATE",
    "Block4",
    "Description",
    "Format",
    "InputMoments",
    "Int8",
    "Product",
    "Rows",
    "State",
    "TensorSpec",
    "check_quant_state",
    "decode_quant_state",
    "dtype_name",
    "encode_quant_state",
    "importance_of",
    "make_format",
    "quant_state_spec",
    "state_name",
]
