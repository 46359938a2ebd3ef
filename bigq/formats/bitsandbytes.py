"""What bitsandbytes stores for a quantized weight: the names of its tensors, its description in JSON and its tables.

The codes and scales are those of NF4, FP4 and Int8 in other shapes: a 4-bit weight is flat, and its blocks run on from
row to row. Beside them it stores what the name of the format implies (the tables), and a JSON object.
docs/formats.md lists the tensors.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from reprlib import repr as short  # of what a file says

import torch
from torch import Tensor

from bigq.errors import UnsupportedError
from bigq.formats.base import State, as_bits
from bigq.formats.block4 import Block4
from bigq.formats.int8 import Int8
from bigq.formats.quant_state import WEIGHT_DTYPES, Description, dtype_name
from bigq.formats.registry import make_format
from bigq.ops import reference
from bigq.ops.checks import as_floats
from bigq.system.json_text import parse_json
from bigq.system.memory import memory_of

__all__ = [
    "ABSMAX",
    "INT8_FORMAT",
    "INT8_SCALES",
    "NESTED_ABSMAX",
    "NESTED_MAP",
    "QUANT_MAP",
    "QUANT_STATES",
    "Flat4",
    "bitsandbytes_settings",
    "bitsandbytes_tensors",
    "flat4",
    "is_bitsandbytes",
    "offset_bits",
    "table",
    "table_bytes",
    "unsupported_by_bitsandbytes",
]

# What follows the name of a 4-bit weight, whose own name is that of its codes.
ABSMAX, QUANT_MAP = ".absmax", ".quant_map"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
QUANT_STATES = {".quant_state.bitsandbytes__nf4": "nf4", ".quant_state.bitsandbytes__fp4": "fp4"}
# What stands beside an int8 weight in its module.
INT8_SCALES, INT8_FORMAT = "SCB", "weight_format"

_LEAVES = {INT8_SCALES, *(suffix.rpartition(".")[2] for suffix in QUANT_STATES)}
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_MAX_SIZE = torch.iinfo(torch.int64).max
_CPU = torch.device("cpu")


def is_bitsandbytes(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names are, or contain, weights that bitsandbytes has quantized."""
    return any(name.rpartition(".")[2] in _LEAVES for name in names)


@cache
def table(kind: str) -> Tensor:
    """The values of codes, float32 on the CPU: the 16 of "nf4" or "fp4", or the 256 of scales ("nested")."""
    if kind == "nested":
        return reference.nested_code(_CPU)
    return torch.tensor(reference.CODES[kind], dtype=torch.float32, device=_CPU)


@cache
def table_bytes(kind: str) -> bytes:
    """The bytes of `table(kind)`."""
    return bytes(memory_of(table(kind)))


@dataclass(frozen=True, kw_only=True)
class Flat4:
    """What the JSON of a 4-bit weight says.

    Args:
        format: NF4 or FP4, with its settings.
        shape: [..., N, K] of the weight.
        dtype: that the weight had before.
        offset: the mean that was subtracted from the scales, with double quantization.
    """

    format: Block4
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: float | None

    @property
    def block_count(self) -> int:
        """How many blocks of the flat weight have a scale."""
        return -(-math.prod(self.shape) // self.format.block_size)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of all codes."""
        return -(-math.prod(self.shape) // 2)

    @property
    def straddles(self) -> bool:
        """Whether a block holds numbers of two rows, so that the weight is none of ours with other shapes."""
        return self.shape[-1] % self.format.block_size != 0 and math.prod(self.shape[:-1]) > 1


def flat4(text: bytes, quant_type: str) -> Flat4:
    """Decode the JSON of a 4-bit weight, whose tensor is named after `quant_type`.

    Raises:
        ValueError: it is none that bitsandbytes writes, or asks for what bigq does not compute.
    """
    fields, twice = parse_json(text)
    if not isinstance(fields, dict):
        raise ValueError(f"it is {short(fields)}; expected an object")
    if twice:
        raise ValueError(f"it gives {short(twice[0])} twice")
    is_nested = any(name in fields for name in _NESTED_FIELDS)
    known = (*_FIELDS, *_NESTED_FIELDS) if is_nested else _FIELDS
    missing, unknown = [name for name in known if name not in fields], fields.keys() - set(known)
    if missing or unknown:
        what = f"it has no {missing[0]!r}" if missing else f"it has {short(min(unknown))}, which bigq does not know"
        raise ValueError(what)
    if fields["quant_type"] != quant_type:
        raise ValueError(f"quant_type is {short(fields['quant_type'])}; expected {quant_type!r}, as its name says")
    shape, dtype = fields["shape"], fields["dtype"]
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape is {short(shape)}; expected a list of sizes")
    if math.prod(size or 1 for size in shape) > _MAX_SIZE:
        raise ValueError(f"shape is {short(shape)}; expected fewer elements")
    if not isinstance(dtype, str) or dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype is {short(dtype)}; expected one of {list(WEIGHT_DTYPES)}")
    weight_format = make_format(quant_type, block_size=fields["blocksize"], double_quant=is_nested)
    assert isinstance(weight_format, Block4)
    return Flat4(
        format=weight_format,
        shape=tuple(shape),
        dtype=WEIGHT_DTYPES[dtype],
        offset=_offset(fields) if is_nested else None,
    )


def _offset(fields: Mapping[str, object]) -> float:
    size, dtype, offset = (fields[name] for name in _NESTED_FIELDS)
    if type(size) is not int or size != reference.NESTED_BLOCK_SIZE:
        raise ValueError(f"nested_blocksize is {short(size)}; expected {reference.NESTED_BLOCK_SIZE}")
    if dtype != "float32":
        raise ValueError(f"nested_dtype is {short(dtype)}; expected 'float32'")
    largest = torch.finfo(torch.float32).max
    if type(offset) not in (int, float) or not -largest <= offset <= largest:  # type: ignore[operator]
        raise ValueError(f"nested_offset is {short(offset)}; expected a finite number")
    return float(offset)  # type: ignore[arg-type]


def unsupported_by_bitsandbytes(description: Description) -> str | None:
    """Why bitsandbytes cannot store a weight; None if it can."""
    weight_format, shape = description.format, description.shape
    if isinstance(weight_format, Int8):
        return None if len(shape) == 2 else f"int8 of {len(shape)} dimensions; expected a matrix"
    if not isinstance(weight_format, Block4):
        return f"it has no format {weight_format.name!r}"
    if shape[-1] % weight_format.block_size and math.prod(shape[:-1]) > 1:
        return (
            f"a row has {shape[-1]} numbers, which is no multiple of the block size, {weight_format.block_size}, and "
            "blocks of bitsandbytes run on into the next row"
        )
    return None


def bitsandbytes_settings(description: Description) -> dict[str, object]:
    """What config.json says of all weights that are stored as `description` says: transformers' keys and defaults."""
    weight_format, compute_dtype = description.format, torch.float32
    block4 = weight_format if isinstance(weight_format, Block4) else None
    if block4 is not None:
        compute_dtype = description.compute_dtype or description.dtype
    return {
        "_load_in_4bit": block4 is not None,
        "_load_in_8bit": block4 is None,
        "bnb_4bit_compute_dtype": dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if block4 is None else block4.name,
        "bnb_4bit_use_double_quant": block4 is not None and block4.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": weight_format.threshold if isinstance(weight_format, Int8) else 6.0,
        "load_in_4bit": block4 is not None,
        "load_in_8bit": block4 is None,
        "quant_method": "bitsandbytes",
    }


def bitsandbytes_tensors(name: str, description: Description, state: State) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores for the quantized weight `name`: views of `state` where they can be.

    Args:
        name: of the weight in the model, such as "up_proj.weight".
        description: of the weight, a matrix.
        state: its parts, on any device.

    Raises:
        UnsupportedError: bitsandbytes cannot store it.
    """
    reason = unsupported_by_bitsandbytes(description)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    weight_format, shape = description.format, description.shape
    if isinstance(weight_format, Block4):
        return _flat(name, weight_format, description, state)
    owner = name.rpartition(".")[0]
    prefix = f"{owner}." if owner else ""
    return {
        name: state["packed"],
        f"{prefix}{INT8_SCALES}": as_floats(state["absmax"]).reshape(shape[0]),
        f"{prefix}{INT8_FORMAT}": torch.zeros((), dtype=torch.uint8),
    }


def _flat(name: str, weight_format: Block4, description: Description, state: State) -> dict[str, Tensor]:
    quant_type = weight_format.name
    fields: dict[str, object] = {
        "quant_type": quant_type,
        "blocksize": weight_format.block_size,
        "dtype": dtype_name(description.dtype),
        "shape": list(description.shape),
    }
    absmax = state["absmax"].reshape(-1)
    tensors = {
        name: state["packed"].reshape(-1, 1),
        name + ABSMAX: absmax if weight_format.double_quant else as_floats(absmax),
        name + QUANT_MAP: table(quant_type).clone(),  # tensors of a file share no memory
    }
    if weight_format.double_quant:
        tensors[name + NESTED_ABSMAX] = as_floats(state["nested_absmax"])
        tensors[name + NESTED_MAP] = table("nested").clone()
        offset = as_floats(state["nested_offset"]).item()
        fields |= dict(zip(_NESTED_FIELDS, (reference.NESTED_BLOCK_SIZE, "float32", offset), strict=True))
    suffix = next(suffix for suffix, kind in QUANT_STATES.items() if kind == quant_type)
    tensors[name + suffix] = torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8).clone()
    return tensors


def offset_bits(offset: float) -> Tensor:
    """The part "nested_offset" of a weight: int32 [1]."""
    return as_bits(torch.tensor([offset], dtype=torch.float32, device=_CPU))
