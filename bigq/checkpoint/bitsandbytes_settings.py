"""BitsandbytesSettings: what config.json says of weights of bitsandbytes, and no tensor beside them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # of what a file says

import torch

from bigq.checkpoint.model_config import read_config
from bigq.errors import CheckpointError
from bigq.formats.quant_state import COMPUTE_DTYPES

__all__ = ["BitsandbytesSettings", "says_bitsandbytes"]


def says_bitsandbytes(quantization_config: Mapping[str, object]) -> bool:
    """Whether the `quantization_config` of a config.json is one of bitsandbytes.

    transformers left the method out before it knew a second one.
    """
    return quantization_config.get("quant_method", "bitsandbytes") == "bitsandbytes"


@dataclass(frozen=True, kw_only=True)
class BitsandbytesSettings:
    """What a checkpoint says of its weights in config.json and nowhere else.

    Args:
        compute_dtype: of products with 4-bit weights. None: the dtype of the activations.
        threshold: of outlier columns, for int8.
    """

    compute_dtype: torch.dtype | None = None
    threshold: float = 6.0

    @classmethod
    def read(cls, folder: Path) -> "BitsandbytesSettings":
        """What the config.json of `folder` says, or what bitsandbytes takes where it says nothing.

        Raises:
            CheckpointError: a value is none that bitsandbytes writes.
        """
        path = folder / "config.json"
        said = read_config(path).get("quantization_config")
        fields = said if isinstance(said, dict) and says_bitsandbytes(said) else {}
        dtype, threshold = fields.get("bnb_4bit_compute_dtype"), fields.get("llm_int8_threshold", cls.threshold)
        if dtype is not None and not (isinstance(dtype, str) and dtype.removeprefix("torch.") in COMPUTE_DTYPES):
            raise CheckpointError(
                f"{path}: bnb_4bit_compute_dtype is {short(dtype)}; expected one of {list(COMPUTE_DTYPES)}"
            )
        if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
            raise CheckpointError(f"{path}: llm_int8_threshold is {short(threshold)}; expected a number >= 0")
        return cls(
            compute_dtype=None if dtype is None else COMPUTE_DTYPES[dtype.removeprefix("torch.")],
            threshold=float(threshold),
        )
