"""infer_device_map: the automatic device map that a load would make."""

import os
from collections.abc import Iterable, Mapping
from functools import partial

from torch import nn

from bigq.config import QuantizationConfig
from bigq.errors import PlacementError
from bigq.interop.bitsandbytes_configs import as_config
from bigq.model.in_place import ModelTensors
from bigq.model.tree import ModelTree
from bigq.planning.automatic import automatic_map
from bigq.planning.device_map import STRATEGIES, as_user_map
from bigq.planning.places import plan_at

__all__ = ["infer_device_map"]


def infer_device_map(
    model: nn.Module,
    quantization_config: QuantizationConfig | object,
    device_map: str = "auto",
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> dict[str, int | str]:
    """Return the automatic device map that `load_and_quantize_model` would make, to print it or to edit it.

    Args:
        model: a model on the meta device or with weights. It is not changed. The dtypes of its parameters are assumed
            to be those of the checkpoint.
        quantization_config: as in `load_and_quantize_model`.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential".
        no_split_module_classes: as in `load_and_quantize_model`.
        max_memory: as in `load_and_quantize_model`.
        offload_folder: if given, the map may use "disk". Nothing is written to it.

    Returns:
        {module or parameter name: GPU index, "cpu" or "disk"}.

    Raises:
        PlacementError: the quantized model does not fit, or `device_map` is another value.
        ConfigError: the config contradicts the model.
        UnsupportedError: the model has no weight to quantize, or is quantized already.

    Example:
        >>> import bigq, torch
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(6)))
        >>> config = bigq.QuantizationConfig("nf4", skip_defaults=False)  # quantize the last linear too
        >>> bigq.infer_device_map(model, config, max_memory={"cpu": 50_000}, offload_folder="offload")
        {'0': 'cpu', '1': 'cpu', '2': 'cpu', '3': 'disk', '4': 'disk', '5': 'disk'}
    """
    if device_map not in STRATEGIES:
        raise PlacementError(f"device_map is {device_map!r}; expected one of {list(STRATEGIES)}")
    config = as_config(quantization_config, model)
    make = partial(plan_at, ModelTree(model), ModelTensors(model), config)
    places = automatic_map(
        model,
        make({"": "cpu"}, None),
        make({"": "disk"}, config.offload),
        device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    return as_user_map(places)
