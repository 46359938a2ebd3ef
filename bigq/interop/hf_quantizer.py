"""HfQuantizer: what transformers asks of a quantized model while it saves, trains, generates and dequantizes it."""

import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer as Base

from bigq.config import QuantizationConfig
from bigq.errors import UnsupportedError
from bigq.loading.dequantize import dequantize
from bigq.model.tree import tensor_name
from bigq.ops.sharding import is_sharded
from bigq.weight.placeholder import placeholder
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.slices import refuse_slices

__all__ = ["HfQuantizer", "given_state"]


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

        Of shards it is the gathered state that `save_pretrained` is given, which transformers asks its quantizer
        instead of.

        Raises:
            UnsupportedError: the model holds slices of its weights, or is sharded and no gathered state is given.
        """
        refuse_slices(model)
        if not any(map(is_sharded, model.parameters())):
            return model.state_dict(), {}
        given, is_main = given_state()
        if given is None or (is_main and not _is_whole(model, given)):
            raise UnsupportedError(
                "save_pretrained cannot save the shards of a quantized model: pass it the state that accelerate or "
                "torch gathers, save_pretrained(folder, state_dict=accelerator.get_state_dict(model)), or call "
                "bigq.save_quantized(model, folder) in every process"
            )
        weights = {tensor_name(name, leaf) for name, module in _quantized(model) for leaf in module.descriptions}
        return {**given, **{name: placeholder() for name in sorted(weights) if given}}, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # save_pretrained leaves a string in the config
            dtype = getattr(torch, dtype.removeprefix("torch."))
        return dequantize(model, dtype)


_GIVEN: ContextVar[tuple[dict[str, Tensor] | None, bool]] = ContextVar("given", default=(None, True))


def given_state() -> tuple[dict[str, Tensor] | None, bool]:
    """The state that the `save_pretrained` that is running is given, and whether its process is to save it."""
    return _GIVEN.get()


def _tell_quantizers() -> None:
    """Let `save_pretrained` note what it is given. transformers passes its quantizers the model alone."""
    save = PreTrainedModel.save_pretrained
    parameters = inspect.signature(save)

    @wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(getattr(self, "hf_quantizer", None), HfQuantizer):
            return save(self, *args, **kwargs)
        given = parameters.bind_partial(self, *args, **kwargs).arguments
        before = _GIVEN.set((given.get("state_dict"), bool(given.get("is_main_process", True))))
        try:
            return save(self, *args, **kwargs)
        finally:
            _GIVEN.reset(before)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _is_whole(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether `state` holds all parts of all quantized weights, and no shards."""
    parts = {tensor_name(name, part) for name, module in _quantized(model) for part in module.state_spec()}
    return parts <= state.keys() and not any(map(is_sharded, state.values()))


def _quantized(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            yield name, module


_tell_quantizers()
