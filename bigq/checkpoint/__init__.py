"""Checkpoints as they come: where their files are, which tensors they hold, and the tensors one by one."""

from bigq.checkpoint.adapters import Adapter, Completed, Conversion, Converted, Renamed
from bigq.checkpoint.bitsandbytes_source import with_bitsandbytes
from bigq.checkpoint.byte_source import ByteSource
from bigq.checkpoint.foreign import decoded_method, foreign_method, is_adapter, refuse_foreign
from bigq.checkpoint.local_file import LocalFile
from bigq.checkpoint.reader import Checkpoint
from bigq.checkpoint.row_windows import Rows, RowWindows
from bigq.checkpoint.scaled_names import (
    FLOAT8,
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    found_weights,
    scale_beside,
    scales_of_activations,
)
from bigq.checkpoint.scaled_rows import ScaledRows, Scales
from bigq.checkpoint.scaled_weights import with_scaled
from bigq.checkpoint.source import (
    ReadError,
    Source,
    StoredTensor,
    read_small,
    read_tensor,
    refuse_unknown,
)
from bigq.checkpoint.spans import Span, cut_out, joined

__all__ = [
    "FLOAT8",
    "MXFP4_BLOCKS",
    "MXFP4_SCALES",
    "Adapter",
    "ByteSource",
    "Checkpoint",
    "Completed",
    "Conversion",
    "Converted",
    "LocalFile",
    "ReadError",
    "Renamed",
    "RowWindows",
    "Rows",
    "ScaledRows",
    "Scales",
    "Source",
    "Span",
    "StoredTensor",
    "cut_out",
    "decoded_method",
    "foreign_method",
    "found_weights",
    "is_adapter",
    "joined",
    "read_small",
    "read_tensor",
    "refuse_foreign",
    "refuse_unknown",
    "scale_beside",
    "scales_of_activations",
    "with_bitsandbytes",
    "with_scaled",
]
