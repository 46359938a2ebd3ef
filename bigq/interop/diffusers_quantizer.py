"""DiffusersQuantizer: what diffusers asks of a quantized model while it saves, compiles, trains and dequantizes it."""

from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer as Base
from torch import Tensor, nn

from bigq.config import QuantizationConfig
from bigq.loading.dequantize import dequantize

__all__ = ["DiffusersQuantizer"]


class DiffusersQuantizer(Base):  # type: ignore[misc]
    """The `hf_quantizer` of a diffusers model that holds quantized weights."""

    quantization_config: QuantizationConfig

    @property
    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on the model may be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether the model may be compiled."""
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` saves: all tensors are plain. A diffusers without bigq refuses the saved config."""
        return state_dict, {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Nothing: the model is quantized already."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Nothing."""

    def dequantize(self, model: Any) -> Any:
        """Make `model` a plain one, with the numbers that its codes stand for."""
        return dequantize(model)

    def remove_quantization_config(self, model: Any) -> None:
        """Make `model` forget that it was quantized; `bigq.dequantize` asks for it, by transformers' name."""
        kept = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = FrozenDict(kept)  # what `register_to_config` extends
        model.is_quantized = False
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
