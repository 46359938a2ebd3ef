"""load_and_quantize_model: checkpoint -> plan -> quantize -> place -> hook."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bigq.checkpoint import Checkpoint, Source
from bigq.config import QuantizationConfig
from bigq.errors import CheckpointError, ConfigError
from bigq.integrations.bitsandbytes_configs import as_config, is_config
from bigq.integrations.parameter_count import count_weights
from bigq.integrations.transformers_names import with_transformers_names
from bigq.loading.destinations import Destinations
from bigq.loading.fill import fill
from bigq.loading.report import make_report
from bigq.loading.stream import Budget
from bigq.loading.timings import Timings
from bigq.loading.warm_up import WarmUp
from bigq.model.in_place import ModelTensors
from bigq.model.own_names import with_own_names
from bigq.model.transaction import Snapshot, restored_on_error
from bigq.model.tree import ModelTree
from bigq.offload.dispatch import dispatch, keep_float32_callable
from bigq.planning.device_map import DeviceMap, execution_device, is_offloaded
from bigq.planning.places import expected_device, plan_and_place
from bigq.planning.plan import Plan

__all__ = ["load_and_quantize_model"]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's cyclic garbage collector from looking at every module of a large model again and again.

    It took a third of the time of 9,000 small tensors; what a load drops is freed by its reference count.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def load_and_quantize_model(
    model: nn.Module,
    weights_location: str | os.PathLike[str] | None = None,
    quantization_config: Any = None,
    device_map: Any = None,
    *,
    bnb_quantization_config: Any = None,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: str | torch.dtype | None = None,
    skip_keys: str | list[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    read_threads: int | None = None,
    read_budget: int | None = None,
) -> nn.Module:
    """Stream a checkpoint into `model`, quantize its linears on the way, and place it as `device_map` says.

    Everything is checked before anything is changed, and the model changes only once every tensor has arrived: a call
    that raises leaves it as it was. Without `weights_location` that holds for all that is checked, hooks and attributes
    included; an interrupt after that leaves the layers that were reached quantized, because keeping the old weights to
    put back would take the memory of both. accelerate's order of the arguments (model, config, weights) works too.

    Args:
        model: any PyTorch model, on meta (`accelerate.init_empty_weights`) or holding weights.
        weights_location: a safetensors file, a .bin or .pt state dict, an index json, a folder with any of these, or a
            Hub repo id (`owner/name@revision`). None quantizes the weights that the model holds, layer by layer.
        quantization_config: a QuantizationConfig, accelerate's BnbQuantizationConfig or transformers'
            BitsAndBytesConfig. None loads a checkpoint that was saved quantized as it is.
        device_map: None (the current GPU, or the CPU where there is none), "auto", "balanced", "balanced_low_0",
            "sequential", a device, or {module name: device, GPU index, "cpu" or "disk"}.
        bnb_quantization_config: accelerate's name of `quantization_config`.
        no_split_module_classes: class names of modules that an automatic map keeps on one device.
        max_memory: {GPU index or "cpu": bytes or "20GiB"} for an automatic map.
        offload_folder: where modules on "disk" are kept, in an unnamed file that goes with the model.
        offload: what is kept of a module on "cpu" or "disk": see QuantizationConfig.offload, which this overrides.
        skip_keys: keyword arguments that hooks do not move between devices, such as a KV cache.
        strict: refuse missing and unexpected tensors; otherwise ignore the latter, and keep what the model holds in
            place of the former where it holds anything.
        progress: show a progress bar; None shows it on a terminal.
        read_threads: threads that read files; by default 12, or the cores that this process may use if fewer.
        read_budget: bytes of host and of GPU memory for weights on their way, besides the result; by default 768 MiB,
            or an eighth of the memory that this process may still use if less.

    Returns:
        `model` itself, in the training mode it was in; `model.quantization_report` says what was done.

    Raises:
        CheckpointError, ConfigError, PlacementError, UnsupportedError: see bigq.errors.
    """
    weights_location, config = _arguments(weights_location, quantization_config, bnb_quantization_config)
    budget, timings, tree = Budget.of_machine(read_threads, read_budget), Timings(), ModelTree(model)
    with timings.timed("plan"):
        source: Source = ModelTensors(model) if weights_location is None else Checkpoint.open(weights_location)
        source = with_own_names(tree, with_transformers_names(tree, source))
    with WarmUp(config, source, expected_device(device_map)) as warm_up:
        with timings.timed("plan"):
            plan, places = plan_and_place(
                tree,
                source,
                config,
                device_map,
                no_split_module_classes=no_split_module_classes,
                max_memory=max_memory,
                offload_folder=offload_folder,
                offload=offload,
                strict=strict,
            )
            destinations = Destinations.open(plan, places, offload_folder, source)
        modules = tree.modules
        del tree  # it keeps tensors alive, and a model that holds its weights frees them one by one
        finish = partial(_finish, model, plan, places, destinations, timings, skip_keys)
        if source.in_place:
            _rehearse(modules, finish)
        jobs = fill(
            modules, plan, source, destinations, budget=budget, timings=timings, warm_up=warm_up, progress=progress
        )
    with restored_on_error(modules):
        with timings.timed("commit"):
            for job in jobs:
                job.commit(modules)
        finish()
    return model


def _finish(
    model: nn.Module,
    plan: Plan,
    places: DeviceMap,
    destinations: Destinations,
    timings: Timings,
    skip_keys: str | list[str] | None,
    *,
    is_placed: bool = True,
) -> None:
    """Give a model that holds its tensors the hooks and attributes that it needs."""
    keep_float32_callable(model, plan)
    dispatch(model, places, skip_keys=skip_keys, is_placed=is_placed)
    model.quantization_method = "bigq"  # type: ignore[assignment]
    model.quantization_report = make_report(plan, destinations.places, timings)  # type: ignore[assignment]
    count_weights(model)
    # The flag by which PEFT and TRL know a k-bit model; accelerate refuses to prepare one of those that is offloaded.
    runs_on = execution_device(places)
    model.is_loaded_in_8bit = not any(is_offloaded(place, runs_on) for place in places.values())  # type: ignore[assignment]


def _rehearse(modules: Mapping[str, nn.Module], finish: Callable[..., None]) -> None:
    """Finish a model that is not converted yet, and undo it: what the model refuses is then known while it is whole."""
    before = Snapshot(modules.values())
    try:
        finish(is_placed=False)
    finally:
        before.restore()


def _arguments(
    weights_location: Any, quantization_config: Any, bnb_quantization_config: Any
) -> tuple[str | os.PathLike[str] | None, QuantizationConfig | None]:
    """The checkpoint and the config, in whichever order and under whichever name they came."""
    if is_config(weights_location) and not is_config(quantization_config):
        weights_location, quantization_config = quantization_config, weights_location
    if quantization_config is not None and bnb_quantization_config is not None:
        raise ConfigError("both quantization_config and bnb_quantization_config are given: pass one")
    config = quantization_config if bnb_quantization_config is None else bnb_quantization_config
    if weights_location is not None and not isinstance(weights_location, (str, os.PathLike)):
        raise CheckpointError(f"weights_location is {weights_location!r}; expected a path or a Hub repo id")
    return weights_location, None if config is None else as_config(config)
