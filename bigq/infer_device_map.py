"""infer_device_map: the device map that a load would make."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from bigq.errors import PlacementError
from bigq.integrations.bitsandbytes_configs import as_config
from bigq.model.in_place import ModelTensors
from bigq.model.tree import ModelTree
from bigq.planning.automatic import automatic_map
from bigq.planning.device_map import STRATEGIES, as_user_map
from bigq.planning.places import plan_at

__all__ = ["infer_device_map"]


def infer_device_map(
    model: nn.Module,
    quantization_config: Any,
    device_map: str = "auto",
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> dict[str, int | str]:
    """The device map that `load_and_quantize_model` would make for `model`, to look at or to edit; changes nothing.

    Args:
        model: a skeleton or a model with weights; the dtypes of its parameters stand for those of the checkpoint.
        quantization_config: as for `load_and_quantize_model`.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential".
        no_split_module_classes, max_memory: as for `load_and_quantize_model`.
        offload_folder: any folder lets the map use "disk"; nothing is written.

    Raises:
        PlacementError: the quantized model does not fit.
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
