"""load_source: the steps of a load: plan, read and quantize, commit, attach hooks."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from bigq.checkpoint import Adapter, Source
from bigq.config import QuantizationConfig
from bigq.interop.bitsandbytes_models import refuse_bitsandbytes
from bigq.interop.diffusers_model import introduce_to_diffusers
from bigq.interop.parameter_count import count_weights
from bigq.interop.transformers_model import introduce
from bigq.loading.destinations import Destinations
from bigq.loading.extra_state import ExtraStates
from bigq.loading.fill import fill
from bigq.loading.report import make_report
from bigq.loading.stream import Budget
from bigq.loading.timings import Timings
from bigq.loading.warm_up import WarmUp
from bigq.model.aliases import Follower, aliases_of
from bigq.model.strays import refuse_strays
from bigq.model.transaction import Snapshot, restored_on_error
from bigq.model.tree import ModelTree
from bigq.offload.dispatch import dispatch, keep_float32_callable
from bigq.open_source import open_source, with_own_tensors
from bigq.planning.coverage import warn_of_weights_left
from bigq.planning.device_map import DeviceMap, execution_device, is_offloaded
from bigq.planning.places import expected_device, plan_and_place
from bigq.planning.plan import Plan
from bigq.system.interrupts import to_the_end

if TYPE_CHECKING:
    pass

__all__ = ["LoadOptions", "collector_paused", "finish_load", "load_source", "open_checkpoint", "plan_load"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of `load_and_quantize_model` that say how a model is placed and read."""

    no_split_module_classes: Iterable[str] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | os.PathLike[str] | None = None
    offload: str | torch.dtype | None = None
    skip_keys: str | list[str] | None = None
    strict: bool = True
    progress: bool | None = None
    budget: Budget = field(default_factory=Budget.of_machine)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector, which would walk all modules of a large model again and again.

    It took a third of the time with 9,000 small tensors. Objects that a load drops are freed by their reference counts.
    One pause lasts from the first step to the last: after each of three, the collector walked what was made in it.
    """
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()  # a function in C: an interrupt comes after it, and not before


def open_checkpoint(
    tree: ModelTree, weights_location: str | os.PathLike[str], config: QuantizationConfig | None, options: LoadOptions
) -> tuple[Source, ExtraStates]:
    refuse_bitsandbytes(tree)
    source, extra_states = open_source(tree, weights_location, strict=options.strict, config=config)
    return (source if options.strict else with_own_tensors(tree, source)), extra_states


def plan_load(
    tree: ModelTree, source: Source, config: QuantizationConfig | None, device_map: object, options: LoadOptions
) -> tuple[Plan, DeviceMap]:
    """Plan a load, and check all that can be checked before anything is read."""
    plan, places = plan_and_place(
        tree,
        source,
        config,
        device_map,
        no_split_module_classes=options.no_split_module_classes,
        max_memory=options.max_memory,
        offload_folder=options.offload_folder,
        offload=options.offload,
        strict=options.strict,
    )
    others_chose = isinstance(source, Adapter) and source.is_of_bitsandbytes
    if plan.rules or others_chose:  # else it was said, or asked for, before
        warn_of_weights_left(tree, plan, config)
    refuse_strays(tree, {n for weight in plan.weights for n in weight.names}, in_place=source.in_place)
    return plan, places


@collector_paused()
def load_source(
    tree: ModelTree,
    source: Source,
    extra_states: ExtraStates | None,
    config: QuantizationConfig | None,
    device_map: object,
    *,
    options: LoadOptions,
    timings: Timings,
) -> nn.Module:
    """Load `source` into the model of `tree`: plan, read and quantize, commit, attach hooks. Returns the model."""
    model, modules = tree.model, tree.modules
    with WarmUp(config, source, expected_device(device_map)) as warm_up:
        with timings.timed("plan"):
            plan, places = plan_load(tree, source, config, device_map, options)
            aliases = aliases_of(tree)
            destinations = Destinations.open(plan, places, options.offload_folder, source)
        tree.forget_tensors()  # if the model holds its weights, they have to be freed one by one
        finish = partial(finish_load, model, plan, places, destinations, timings, options.skip_keys, config)
        if source.in_place:
            _rehearse(modules, finish)
        jobs = fill(
            modules,
            plan,
            source,
            destinations,
            budget=options.budget,
            timings=timings,
            warm_up=warm_up,
            progress=options.progress,
        )
    follower = Follower(aliases, modules)
    with restored_on_error(modules, undo=follower.undo):
        with timings.timed("commit"):
            for job in jobs:
                job.commit(modules)
        if extra_states is not None:
            extra_states.hand_over()
        follower.follow()
        finish()
    return model


def finish_load(
    model: nn.Module,
    plan: Plan,
    places: DeviceMap,
    destinations: Destinations,
    timings: Timings,
    skip_keys: str | list[str] | None,
    config: QuantizationConfig | None,
    *,
    is_placed: bool = True,
) -> None:
    """Attach the hooks and attributes that a model needs, once it holds its tensors."""
    keep_float32_callable(model, plan)
    dispatch(model, places, skip_keys=skip_keys, is_placed=is_placed)
    model.quantization_method = "bigq"  # type: ignore[assignment]
    model.quantization_report = make_report(plan, destinations.places, timings)  # type: ignore[assignment]
    count_weights(model)
    known_as = config or _found_config(plan)
    introduce(model, known_as)
    introduce_to_diffusers(model, known_as)
    # PEFT and TRL recognize a k-bit model by this flag. accelerate refuses to prepare an offloaded model that has it.
    runs_on = execution_device(places)
    model.is_loaded_in_8bit = not any(is_offloaded(place, runs_on) for place in places.values())  # type: ignore[assignment]


def _found_config(plan: Plan) -> QuantizationConfig:
    """The config by which the weights of a checkpoint may have been quantized: that of the first."""
    description = plan.weights[0].description
    return QuantizationConfig(description.format, compute_dtype=description.compute_dtype)


def _rehearse(modules: Mapping[str, nn.Module], finish: Callable[..., None]) -> None:
    """Call `finish` on a model that is not changed yet, and undo it, so that an error in it comes before any change."""
    before = Snapshot(modules.values())
    try:
        finish(is_placed=False)
    finally:
        try:
            before.restore()
        except BaseException:  # also an interrupt as it is entered
            to_the_end(before.restore)
            raise
