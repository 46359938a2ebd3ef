"""HfQuantizer: what transformers asks of a quantized model while it saves, trains, generates and dequantizes it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer as Base

from bigq.config import QuantizationConfig
from bigq.errors import UnsupportedError
from bigq.loading.dequantize import dequantize
from bigq.ops.sharding import is_sharded
from bigq.weight.slices import refuse_slices

__all__ = ["HfQuantizer"]


class HfQuantizer(Base):
    """The `hf_quantizer` of a transformers model that holds quantized weights."""

    quantization_config: QuantizationConfig  # type: ignore[assignment]
    requires_calibration = False

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on the model may be trained; without any, transformers' Trainer refuses."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model for a static cache."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` saves, placeholders among it.

        Raises:
            UnsupportedError: the model holds slices of its weights, or is sharded. A gathered state that is passed to
                `save_pretrained` does not get here, because transformers asks its quantizer instead.
        """
        refuse_slices(model)
        if any(map(is_sharded, model.parameters())):
            raise UnsupportedError(
                "save_pretrained cannot save the shards of a quantized model: call bigq.save_quantized(model, folder) "
                "in every process, or save the state that accelerate or torch gathers"
            )
        return model.state_dict(), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # save_pretrained leaves a string in the config
            dtype = getattr(torch, dtype.removeprefix("torch."))
        return dequantize(model, dtype)
