"""quant_state: the tensor that describes a module's quantized weights, so that loading them needs no config.

It is one uint8 tensor for each module, with a record of 256 bytes for each quantized weight: a JSON object in UTF-8,
padded with spaces. All records have one length, so that the shape is known before the weights are. It is a tensor
because accelerate's save_model and safetensors save nothing else. docs/formats.md lists the fields.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as short  # of what a file says

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedError
from bigq.formats.base import Format, TensorSpec
from bigq.formats.registry import make_format
from bigq.system.json_text import parse_json

__all__ = [
    "COMPUTE_DTYPES",
    "QUANT_STATE",
    "WEIGHT_DTYPES",
    "Description",
    "check_quant_state",
    "decode_quant_state",
    "dtype_name",
    "encode_quant_state",
    "quant_state_spec",
    "state_name",
]

QUANT_STATE = "quant_state"  # its name in a module
_VERSION = 2
_RECORD_NBYTES = 256
_MAX_RECORDS = 4096
WEIGHT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
COMPUTE_DTYPES = {name: dtype for name, dtype in WEIGHT_DTYPES.items() if name != "float64"}
_FIELDS = ("bigq", "leaf", "format", "shape", "dtype", "compute_dtype", "transposed")  # beside the format's settings


def state_name(leaf: str, part: str) -> str:
    """The name of a part of the weight `leaf`, in its module or in the model: "weight_packed"."""
    return f"{leaf}_{part}"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is needed to use a quantized weight: its format, its shape and its dtypes.

    Args:
        format: of the weight.
        shape: [..., N, K], as stored.
        dtype: that `module.weight` reports.
        compute_dtype: of products with the weight. None: the dtype of the activations.
        transposed: whether the module's weight is [..., K, N], as that of GPT-2's Conv1D.

    Attributes:
        state_spec: shapes and dtypes of the parts, by part.
        nbytes: bytes of all parts.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute_dtype: torch.dtype | None = None
    transposed: bool = False

    state_spec: dict[str, TensorSpec] = field(init=False, compare=False, repr=False)
    nbytes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        spec = self.format.state_spec(self.shape)
        object.__setattr__(self, "state_spec", spec)
        object.__setattr__(self, "nbytes", sum(tensor.nbytes for tensor in spec.values()))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the module's weight."""
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape


def quant_state_spec(count: int) -> TensorSpec:
    """Shape and dtype of the quant_state of a module with `count` quantized weights."""
    return TensorSpec(shape=(count * _RECORD_NBYTES,), dtype=torch.uint8)


def encode_quant_state(weights: Mapping[str, Description]) -> Tensor:
    """Encode {leaf: description} of a module's quantized weights as its quant_state, on the CPU.

    Raises:
        UnsupportedError: a record does not fit into 256 bytes.
    """
    data = bytearray().join(_record(leaf, description) for leaf, description in weights.items())
    return torch.frombuffer(data, dtype=torch.uint8).clone()


def check_quant_state(shape: Sequence[int], dtype: torch.dtype, where: str) -> None:
    """Raise a CheckpointError unless a tensor of this shape and dtype can be a quant_state."""
    records, rest = divmod(shape[0] if len(shape) == 1 else 0, _RECORD_NBYTES)
    if dtype != torch.uint8 or rest or not 0 < records <= _MAX_RECORDS:
        raise CheckpointError(
            f"{where} is not a description of quantized weights: expected uint8, {_RECORD_NBYTES} bytes a weight, "
            f"got {dtype_name(dtype)} {list(shape)}"
        )


def decode_quant_state(quant_state: Tensor, where: str) -> dict[str, Description]:
    """Decode the quant_state of a module to {leaf: description}. `where` names the tensor in errors.

    Raises:
        CheckpointError: `encode_quant_state` did not write it, or another version of bigq did.
    """
    check_quant_state(quant_state.shape, quant_state.dtype, where)
    try:
        data = bytes(quant_state.tolist())
        records = [data[start : start + _RECORD_NBYTES] for start in range(0, len(data), _RECORD_NBYTES)]
        return _distinct(_parsed(record) for record in records)
    except ValueError as error:  # a ConfigError is one
        raise CheckpointError(f"{where} is not a description of bigq weights: {error}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _record(leaf: str, description: Description) -> bytes:
    fields = {
        "bigq": _VERSION,
        "leaf": leaf,
        **description.format.describe(),
        "shape": list(description.shape),
        "dtype": dtype_name(description.dtype),
        "compute_dtype": None if description.compute_dtype is None else dtype_name(description.compute_dtype),
        "transposed": description.transposed,
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    if len(text) > _RECORD_NBYTES:
        raise UnsupportedError(
            f"the description of {leaf!r} takes {len(text)} bytes in a checkpoint; there is room for {_RECORD_NBYTES}: "
            f"{text.decode()}"
        )
    return text.ljust(_RECORD_NBYTES)


def _parsed(record: bytes) -> tuple[str, Description]:
    fields, twice = parse_json(record)
    if not isinstance(fields, dict):
        raise ValueError(f"it is {short(fields)}; expected an object")
    if twice:
        raise ValueError(f"it gives {short(twice[0])} twice")
    missing = [name for name in _FIELDS if name not in fields]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    version, leaf, name, shape, dtype, compute_dtype, transposed = (fields.pop(field) for field in _FIELDS)
    if type(version) is not int or version != _VERSION:
        raise ValueError(
            f"version {short(version)}, and this bigq reads version {_VERSION}: quantize the weights again"
        )
    if not isinstance(leaf, str) or not leaf or "." in leaf:
        raise ValueError(f"leaf is {short(leaf)}; expected the name of a parameter in its module")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape is {short(shape)}; expected a list of sizes")
    if type(transposed) is not bool:
        raise ValueError(f"transposed is {short(transposed)}; expected true or false")
    return leaf, Description(
        format=make_format(name, **fields),
        shape=tuple(shape),
        dtype=_dtype("dtype", dtype, WEIGHT_DTYPES),
        compute_dtype=None if compute_dtype is None else _dtype("compute_dtype", compute_dtype, COMPUTE_DTYPES),
        transposed=transposed,
    )


def _dtype(field: str, name: object, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype called `name`; by a table, because torch imports some of its modules when it is asked for a name."""
    if not isinstance(name, str) or name not in dtypes:
        raise ValueError(f"{field} is {short(name)}; expected one of {list(dtypes)}")
    return dtypes[name]


def _distinct(records: Iterable[tuple[str, Description]]) -> dict[str, Description]:
    weights: dict[str, Description] = {}
    for leaf, description in records:
        if leaf in weights:
            raise ValueError(f"it describes {leaf!r} twice")
        weights[leaf] = description
    return weights
