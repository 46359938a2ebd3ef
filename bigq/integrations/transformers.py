"""transformers: `from_pretrained` with a QuantizationConfig, or of a folder that bigq has saved, loads with bigq.

Importing this file registers bigq's quantizer. transformers asks a QuantizationConfig for its `quant_method`, which
imports it too; so only a folder that is quantized already needs the import:

    import bigq.integrations.transformers

transformers chooses the class, makes the skeleton, finds the files and initializes what they lack. Then bigq reads the
files, in place of transformers: that makes one pass over them, with its own readers and kernels, and understands
device maps with "cpu" and "disk". Works with transformers 5.17 to 5.23.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import transformers
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        AutoHfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.loading_report import LoadStateDictInfo
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"bigq.integrations.transformers works with transformers 5.17 to 5.23, and {error}: "
        "pip install 'transformers>=5.17'"
    ) from error

import torch
from torch import nn

from bigq.checkpoint import Renamed, Source
from bigq.checkpoint.bitsandbytes_settings import says_bitsandbytes
from bigq.config import QuantizationConfig
from bigq.errors import UnsupportedError
from bigq.formats import state_name
from bigq.interop.bitsandbytes_configs import as_config
from bigq.interop.hf_quantizer import HfQuantizer
from bigq.interop.transformers_names import expected_names
from bigq.load_source import LoadOptions, load_source
from bigq.loading.timings import Timings
from bigq.model.tree import ModelTree
from bigq.open_source import open_source, with_own_tensors
from bigq.planning.device_map import execution_device, normalize_device_map
from bigq.planning.make_plan import quant_states

if TYPE_CHECKING:
    from bigq.integrations.transformers_parallel import Distribution

__all__ = ["LoadingQuantizer", "SavedConfig", "use_as_bitsandbytes"]

_OWN = transformers.PreTrainedModel  # the class whose steps are taken over
_STEPS = {  # what transformers does between the skeleton and `eval`, and the arguments that it passes
    "_load_pretrained_model": ("model", "state_dict", "checkpoint_files", "load_config"),
    "_finalize_model_loading": ("model", "load_config", "loading_info"),
}
_DISTRIBUTES = "maybe_distribute_model"  # what shards the skeleton, in releases that have it
_LOADED_BY = "_bigq_quantizer"  # where a skeleton has its quantizer until then
_EMPTY: dict[str, type] = {"error_msgs": list, "conversion_errors": dict}  # fields of its report that are no sets


class SavedConfig(QuantizationConfigMixin):
    """Reads the `quantization_config` of a config.json. Making one makes a QuantizationConfig."""

    __init__ = QuantizationConfig.__init__  # diffusers wants one signature for the configs of both libraries

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        return QuantizationConfig(*args, **settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The QuantizationConfig that was saved."""
        config = QuantizationConfig.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class LoadingQuantizer(HfQuantizer):
    """The quantizer of one `from_pretrained`: it keeps where the model is to go, and loads it.

    transformers sees a device map of one device, so it attaches no hooks. bigq gets the map that the user wrote.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if kwargs.get("pre_quantized") and hasattr(quantization_config, "bnb_4bit_quant_storage"):
            quantization_config = copy(quantization_config)  # how the codes are stored is seen in the file
            quantization_config.bnb_4bit_quant_storage = torch.uint8
        config: Any = as_config(quantization_config)
        super().__init__(config, **kwargs)
        self._asked = quantization_config
        self._device_map: object = None
        self._max_memory: Mapping[int | str, int | str] | None = None
        self.distribution: Distribution | None = None

    def update_device_map(self, device_map: Any) -> Any:
        """Keep the user's map, and return one by which transformers places nothing."""
        self._device_map = device_map
        return "sequential" if isinstance(device_map, str) else {"": "cpu"}

    def adjust_max_memory(self, max_memory: Any) -> Any:
        """Keep the limits of an automatic map, and return one by which transformers' own map has one place."""
        self._max_memory = dict(max_memory)
        return {"cpu": 1 << 62}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if _ORIGINALS is None:
            raise UnsupportedError(
                f"transformers {transformers.__version__} does not load as 5.17 to 5.23 do: build the model from its "
                "config, and pass it and the folder to bigq.load_and_quantize_model"
            )
        vars(model)[_LOADED_BY] = self

    def load(self, model: Any, files: Sequence[str] | None, load_config: Any) -> LoadStateDictInfo:
        """Fill the skeleton `model` from `files`. What they lack is initialized first, as the model's class does it."""
        if not files:
            raise UnsupportedError("a state_dict cannot be quantized by from_pretrained: pass a folder or a repo id")
        if load_config.device_mesh is not None and self.distribution is None:
            raise UnsupportedError(
                f"transformers {transformers.__version__} does not distribute a model as 5.23 does: load it, and call "
                "bigq.integrations.tensor_parallel.parallelize_module"
            )
        timings = Timings()
        with timings.timed("plan"):
            tree = ModelTree(model)
            opened, extra_states = open_source(
                tree, [Path(file) for file in files], strict=False, conversions=load_config.weight_mapping
            )
            info, source = _compare(tree, opened, load_config.ignore_mismatched_sizes)
            _finalize(model, replace(load_config, device_map={"": "cpu"}), info)
            tree = ModelTree(model)  # weights are tied now
            source = with_own_tensors(tree, source)
        config = as_config(self._asked, model)
        config = replace(config, dtype=config.dtype or load_config.dtype)
        self.quantization_config = config
        load_source(
            tree,
            source,
            extra_states,
            None if quant_states(source.tensors) else config,
            self._device_map,
            options=LoadOptions(
                max_memory=self._max_memory, offload_folder=load_config.disk_offload_folder, strict=False
            ),
            timings=timings,
        )
        if load_config.device_map is not None:
            load_config.device_map.clear()  # ours, by `update_device_map`
            load_config.device_map[""] = _runs_on(model)  # where transformers puts adapters
        if self.distribution is not None:
            self.distribution.apply(model)
        return info


def _compare(tree: ModelTree, source: Source, ignore_mismatched_sizes: bool) -> tuple[LoadStateDictInfo, Source]:
    """What `source` lacks and what it holds in addition, and `source` without tensors of a shape that is ignored.

    Marks the tensors that it holds, so that transformers does not initialize them.
    """
    info = LoadStateDictInfo(**{field.name: _EMPTY.get(field.name, set)() for field in fields(LoadStateDictInfo)})
    for names, tensor, _, persistent in tree.tensors:
        if not persistent:
            continue
        held = [name for name in names if name in source.tensors]
        other = [name for name in held if source.tensors[name].shape != tensor.shape]
        if other and ignore_mismatched_sizes:
            mismatched: set[Any] = {(name, source.tensors[name].shape, tensor.shape) for name in other}
            info.mismatched_keys |= mismatched
        elif held or any(state_name(name, "packed") in source.tensors for name in names):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        else:
            info.missing_keys.update(names)
    info.unexpected_keys.update(source.tensors.keys() - expected_names(tree, source.tensors).keys())
    if info.mismatched_keys:
        source = Renamed(source, {name: None for name, *_ in info.mismatched_keys})
    return info, source


def _runs_on(model: nn.Module) -> torch.device:
    places = getattr(model, "hf_device_map", None)
    return execution_device(normalize_device_map(places)) if places else next(model.parameters()).device


def _finalize(model: nn.Module, load_config: Any, loading_info: LoadStateDictInfo) -> Any:
    assert _ORIGINALS is not None
    return _ORIGINALS["_finalize_model_loading"](model, load_config, loading_info)


def _take_over() -> dict[str, Callable[..., Any]] | None:
    """Make the steps of transformers' loading ask for a LoadingQuantizer; what they were, or None if they differ.

    Its quantizers see one tensor at a time, after it was read and moved. There is no public way to read otherwise.
    """
    originals: dict[str, Callable[..., Any]] = {name: getattr(_OWN, name, lambda: None) for name in _STEPS}
    if any(tuple(inspect.signature(originals[n]).parameters)[: len(names)] != names for n, names in _STEPS.items()):
        return None

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None) -> Any:
        quantizer = load_config.hf_quantizer
        if not isinstance(quantizer, LoadingQuantizer) or expected_keys is not None:  # those of an adapter
            step = originals["_load_pretrained_model"]
            return step(model, state_dict, checkpoint_files, load_config, expected_keys)
        return quantizer.load(model, checkpoint_files, load_config), None

    def finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        if not isinstance(load_config.hf_quantizer, LoadingQuantizer):
            return originals["_finalize_model_loading"](model, load_config, loading_info)
        return loading_info  # `load` has done it, before it read anything

    own: Any = _OWN
    own._load_pretrained_model = staticmethod(load)
    own._finalize_model_loading = staticmethod(finalize)
    _take_over_distributing()
    return originals


def _take_over_distributing() -> None:
    """Make the step that shards a skeleton leave that of a LoadingQuantizer whole, and note what it would do."""
    step = getattr(_OWN, _DISTRIBUTES, None)
    if step is None or tuple(inspect.signature(step).parameters) != ("model", "distributed_config", "mesh_manager"):
        return

    def distribute(cls: Any, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        quantizer = vars(model).pop(_LOADED_BY, None)
        if quantizer is None or mesh_manager is None:
            return step(model, distributed_config, mesh_manager)
        from bigq.integrations.transformers_parallel import Distribution  # imports torch.distributed.tensor

        quantizer.distribution = Distribution.of(step, model, distributed_config, mesh_manager)
        return model

    setattr(_OWN, _DISTRIBUTES, classmethod(distribute))


def use_as_bitsandbytes() -> None:
    """Let bigq load what asks for bitsandbytes: BitsAndBytesConfig, `load_in_4bit` recipes and repositories.

    bitsandbytes need not be installed. It holds for the process, and cannot be undone.

    Example:
        >>> import bigq.integrations.transformers
        >>> bigq.integrations.transformers.use_as_bitsandbytes()
    """
    AUTO_QUANTIZER_MAPPING.update(bitsandbytes_4bit=LoadingQuantizer, bitsandbytes_8bit=LoadingQuantizer)


def _take_over_configs() -> None:
    """Let a QuantizationConfig stand where config.json says that another library has quantized the weights.

    transformers refuses two kinds of config, before anything is read. bigq reads some of these weights as floats, and
    refuses the others by name when it opens the files.
    """
    step = AutoHfQuantizer.merge_quantization_configs
    if tuple(inspect.signature(step).parameters) != ("quantization_config", "quantization_config_from_args"):
        return

    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked = quantization_config_from_args
        if isinstance(asked, QuantizationConfig) and isinstance(quantization_config, dict):
            is_ours = quantization_config.get("quant_method") == asked.quant_method
            if not is_ours and not says_bitsandbytes(quantization_config):
                return asked
        return step(quantization_config, asked)

    own: Any = AutoHfQuantizer
    own.merge_quantization_configs = classmethod(merge)


_ORIGINALS = _take_over()
_take_over_configs()
register_quantization_config("bigq")(SavedConfig)
register_quantizer("bigq")(LoadingQuantizer)
