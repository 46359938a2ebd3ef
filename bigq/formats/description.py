"""The quant_state tensor: how a saved weight says what it is, so that loading it needs no config.

It is uint8 [256]: a JSON object in UTF-8, padded with spaces to one length for all, so that skeletons agree on its
shape. A tensor, because accelerate's save_model and safetensors carry nothing else with a weight.
"""

import json
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bigq.errors import CheckpointError, ConfigError
from bigq.formats.base import Format, TensorSpec
from bigq.formats.block4 import Block4
from bigq.formats.int8 import Int8

__all__ = ["QUANT_STATE_SPEC", "Description", "dtype_name", "make_format"]


_VERSION = 1
QUANT_STATE_SPEC = TensorSpec(shape=(256,), dtype=torch.uint8)


def make_format(name: str, **settings: object) -> Format:
    """The format called `name`; `settings` are its own fields, any other is a ConfigError."""
    if name in ("nf4", "fp4"):
        kind: type[Block4] | type[Int8] = Block4
        settings = {"quant_type": name, **settings}
    elif name == "int8":
        kind = Int8
    else:
        raise ConfigError(f"format is {name!r}; expected 'nf4', 'fp4' or 'int8'")
    try:
        return kind(**settings)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"format {name!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything needed to use a quantized weight: its format, its shape, and the dtypes of its two ends.

    `dtype` is the weight's own before it was quantized; `compute_dtype` is None for that of the activations.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute_dtype: torch.dtype | None = None

    @cached_property
    def state_spec(self) -> dict[str, TensorSpec]:
        """The named tensors of the quantized weight, this description among them."""
        return {**self.format.state_spec(self.shape), "quant_state": QUANT_STATE_SPEC}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the quantized weight, everything that `state_spec` names."""
        return sum(spec.nbytes for spec in self.state_spec.values())

    def encode(self) -> Tensor:
        """This description as a quant_state tensor on the CPU."""
        text = json.dumps(
            {
                "bigq": _VERSION,
                **self.format.describe(),
                "shape": list(self.shape),
                "dtype": dtype_name(self.dtype),
                "compute_dtype": None if self.compute_dtype is None else dtype_name(self.compute_dtype),
            }
        )
        padded = text.encode().ljust(QUANT_STATE_SPEC.nbytes)
        assert len(padded) == QUANT_STATE_SPEC.nbytes, text
        return torch.frombuffer(bytearray(padded), dtype=torch.uint8).clone()

    @classmethod
    def decode(cls, quant_state: Tensor, where: str) -> "Description":
        """Read a quant_state tensor; `where` names it in the CheckpointError that anything unexpected raises."""
        try:
            fields = json.loads(bytes(quant_state.tolist()))
            version = fields.pop("bigq")
            if version != _VERSION:
                raise ValueError(f"version {version}, and this bigq reads version {_VERSION}: upgrade bigq")
            shape, dtype, compute = fields.pop("shape"), fields.pop("dtype"), fields.pop("compute_dtype")
            return cls(
                format=make_format(fields.pop("format"), **fields),
                shape=tuple(int(size) for size in shape),
                dtype=_dtype(dtype),
                compute_dtype=None if compute is None else _dtype(compute),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{where} is not a description of a bigq weight: {error!r}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype
