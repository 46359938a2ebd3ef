"""diffusers: `from_pretrained` with a QuantizationConfig, or of a folder that bigq has saved, loads with bigq.

Importing this file registers bigq's quantizer. A model's own `from_pretrained` asks a QuantizationConfig for its
`quant_method`, which imports it too. A PipelineQuantizationConfig, and a folder that is quantized already, need the
import:

    import bigq.integrations.diffusers

diffusers chooses the class, makes the skeleton and finds the files. Then bigq reads the files, in place of diffusers:
that makes one pass over them, with its own readers and kernels, and understands device maps with "cpu" and "disk".
Works with diffusers 0.42.
"""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.utils import logging
from torch import nn

from bigq.checkpoint import Source
from bigq.config import QuantizationConfig
from bigq.errors import UnsupportedError
from bigq.interop.diffusers_quantizer import DiffusersQuantizer
from bigq.interop.transformers_names import expected_names
from bigq.load_source import LoadOptions, load_source
from bigq.loading.timings import Timings
from bigq.model.tree import ModelTree
from bigq.open_source import open_source
from bigq.planning.make_plan import quant_states
from bigq.system.text import shortlist

__all__ = ["LoadingQuantizer"]

_STEP = "_load_pretrained_model"  # what diffusers does between the skeleton and `eval`, and the arguments it passes
_ARGUMENTS = {"model", "state_dict", "resolved_model_file", "hf_quantizer", "dtype", "offload_folder"}

_log = logging.get_logger(__name__)


class LoadingQuantizer(DiffusersQuantizer):
    """The quantizer of one `from_pretrained`: it keeps where the model is to go, and loads it.

    diffusers sees no device map, so it attaches no hooks. bigq gets the map that the user wrote.
    """

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._device_map: object = None
        self._max_memory: Mapping[int | str, int | str] | None = None
        self._asked_dtype: torch.dtype | None = None
        self._placed: dict[str, Any] = {}  # what diffusers overwrites in the model: see `load`

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return diffusers' own default, float32, where the user names no dtype."""
        self._asked_dtype = torch_dtype
        return self.quantization_config.dtype or torch_dtype or torch.float32

    def update_device_map(self, device_map: Any) -> Any:
        """Keep the user's map; an automatic one is returned, so that diffusers asks for the limits of memory."""
        self._device_map = device_map
        return "sequential" if isinstance(device_map, str) else None

    def adjust_max_memory(self, max_memory: Any) -> Any:
        """Keep the limits of an automatic map, and return one by which diffusers' own map has one place."""
        self._max_memory = dict(max_memory)
        return {"cpu": 1 << 62}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if _ORIGINAL is None:
            raise UnsupportedError(
                f"diffusers {diffusers.__version__} does not load as 0.42 does: build the model with `from_config`, "
                "and pass it and the folder to bigq.load_and_quantize_model"
            )
        if "state_dict" in kwargs:
            raise UnsupportedError(
                "from_single_file cannot quantize with bigq: load the model without a quantization_config, save it "
                "with save_pretrained, and pass the config to from_pretrained"
            )

    def load(self, model: Any, files: Sequence[str], dtype: torch.dtype, folder: str | None) -> list[str]:
        """Fill the skeleton `model` from `files`; returns the names that they hold and the model does not."""
        timings = Timings()
        tree = ModelTree(model)
        with timings.timed("plan"):
            source, extra_states = open_source(tree, [Path(file) for file in files], strict=False)
        unexpected = sorted(source.tensors.keys() - expected_names(tree, source.tensors).keys())
        is_saved = bool(quant_states(source.tensors))
        if is_saved:
            _refuse_cast(source, self._asked_dtype)
        config = self.quantization_config if is_saved else replace(self.quantization_config, dtype=dtype)
        load_source(
            tree,
            source,
            extra_states,
            None if is_saved else config,
            self._device_map,
            options=LoadOptions(max_memory=self._max_memory, offload_folder=folder, strict=False),
            timings=timings,
        )
        self.quantization_config = config
        model.register_to_config(quantization_config=config)
        # With an automatic map diffusers goes on to move the model to the one place of its own map.
        self._placed = {name: vars(model).get(name) for name in ("to", "hf_device_map")}
        model.to = lambda *args, **kwargs: model
        return unexpected

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, value in self._placed.items():
            vars(model).pop(name, None)
            if value is not None:
                vars(model)[name] = value
        self._placed = {}


def _refuse_cast(source: Source, asked: torch.dtype | None) -> None:
    """Raise an UnsupportedError unless most floating tensors of a quantized checkpoint have the dtype that is asked."""
    dtypes = Counter(stored.dtype for stored in source.tensors.values() if stored.dtype.is_floating_point)
    found = dtypes.most_common(1)[0][0] if dtypes else asked
    if asked not in (None, found):
        raise UnsupportedError(
            f"the quantized model was saved with {found}, and torch_dtype is {asked}: leave torch_dtype out, or "
            "quantize the original model with it"
        )


def _take_over() -> Any:
    """Make the step of diffusers' loading ask for a LoadingQuantizer; what it was, or None if it differs.

    Its quantizers see one tensor at a time, after it was read, moved and cast. There is no public way to read
    otherwise.
    """
    original: Any = getattr(ModelMixin, _STEP, lambda: None)
    if not inspect.signature(original).parameters.keys() >= _ARGUMENTS:
        return None
    own = original.__func__

    def load(cls: Any, model: Any, state_dict: Any, resolved_model_file: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = kwargs.get("hf_quantizer")
        if not isinstance(quantizer, LoadingQuantizer):
            return own(cls, model, state_dict, resolved_model_file, *args, **kwargs)
        unexpected = quantizer.load(model, resolved_model_file, kwargs["dtype"], kwargs["offload_folder"])
        if unexpected:
            _log.warning(f"{cls.__name__} does not use these tensors of the checkpoint: {shortlist(unexpected)}")
        return model, [], unexpected, [], None, []

    setattr(ModelMixin, _STEP, classmethod(load))
    return original


with suppress(ImportError):  # a transformers that is absent has no text encoders; one that is too old refuses later
    import bigq.integrations.transformers  # noqa: F401 - those of a saved pipeline are quantized too
_ORIGINAL = _take_over()
AUTO_QUANTIZATION_CONFIG_MAPPING["bigq"] = QuantizationConfig  # diffusers has no function that registers
AUTO_QUANTIZER_MAPPING["bigq"] = LoadingQuantizer
