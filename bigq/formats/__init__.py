"""Weight formats: one frozen dataclass each, and the description that travels with a saved weight."""

from bigq.formats.base import Format, State, TensorSpec
from bigq.formats.block4 import BLOCK_SIZES, Block4
from bigq.formats.description import QUANT_STATE_SPEC, Description, dtype_name, make_format
from bigq.formats.int8 import Int8

__all__ = [
    "BLOCK_SIZES",
    "QUANT_STATE_SPEC",
    "Block4",
    "Description",
    "Format",
    "Int8",
    "State",
    "TensorSpec",
    "dtype_name",
    "make_format",
]
