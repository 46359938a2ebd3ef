"""load_into_shards: the steps of a load in which each process of a mesh reads and quantizes the rows that it keeps."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from bigq.config import QuantizationConfig
from bigq.errors import UnsupportedError
from bigq.load_source import LoadOptions, collector_paused, finish_load, open_checkpoint, plan_load
from bigq.loading.adapters_in_shards import keeping_numbers, refuse_new_adapters
from bigq.loading.agreement import Agreement
from bigq.loading.destinations import Destinations
from bigq.loading.fill import fill
from bigq.loading.report import make_report
from bigq.loading.sharded_model import Sharding, expected_rows, shard_blocks, stand_in
from bigq.loading.shards import Shards
from bigq.loading.timings import Timings
from bigq.loading.unload import is_loaded
from bigq.loading.warm_up import WarmUp
from bigq.model.transaction import restored_on_error
from bigq.model.tree import ModelTree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["load_into_shards"]


@collector_paused()
def load_into_shards(
    tree: ModelTree,
    weights_location: str | os.PathLike[str],
    config: QuantizationConfig | None,
    mesh: "DeviceMesh",
    shard: Callable[[nn.Module], object] | None,
    options: LoadOptions,
) -> nn.Module:
    """Load the part of a checkpoint that this process of `mesh` keeps; all processes do so, or none."""
    agreement, timings = Agreement.of(mesh), Timings()
    model, modules = tree.model, tree.modules
    with timings.timed("plan"):
        with agreement.all_or_none():
            if is_loaded(tree):
                raise UnsupportedError("the model is quantized already: a load into shards takes a newly built one")
            source, extra_states = open_checkpoint(tree, weights_location, config, options)
            plan, places = plan_load(tree, source, config, agreement.device, options)
        agreement.same("plans", plan.fingerprint(source.tensors))
    with restored_on_error(modules, from_shards=True):  # from here on, as it makes torch forget that they are sharded
        tree.forget_tensors()
        with agreement.all_or_none(), WarmUp(config, source, agreement.device) as warm_up:
            with timings.timed("plan"):
                stand_in(modules, plan, agreement.device)
                rows = expected_rows(plan, mesh)
                shards = Shards.of(plan, rows)
                folder = options.offload_folder
                own = partial(shard_blocks, mesh=mesh, offload=folder is not None)
                call = own if shard is None else keeping_numbers(shard, agreement.device)
                sharding = Sharding(call, model, modules, plan, folder, timings)
                destinations = Destinations.open(
                    shards.plan, places, None, source, cuts=shards.cuts, moved=sharding.moved
                )
            read = partial(
                fill,
                modules,
                budget=options.budget,
                timings=timings,
                warm_up=warm_up,
                progress=options.progress if agreement.is_first else False,
                lends=lambda: sharding.is_resident,
            )
            jobs = read(shards.to_read(), shards.source(source), destinations, between=sharding.done)
            result, tensors = sharding.done()
            if tensors.rows != rows:  # some were sharded in another way
                expected, shards = shards, Shards.of(plan, tensors.rows)
                others = shards.to_read(after=expected)
                names = {*(own.names[0] for own in others.tensors), *(own.names[0] for own in others.weights)}
                jobs = [job for job in jobs if job.planned.names[0] not in names]
                jobs += read(others, shards.source(source), replace(destinations, cuts=shards.cuts))
            gathers = tensors.gathers(shards, jobs, agreement.device)
        agreement.same("sets of sharded tensors", " ".join(sorted(tensors.rows)))  # as their scales are gathered
        with agreement.all_or_none():
            with timings.timed("commit"):
                tensors.commit(shards, jobs, gathers)
            extra_states.hand_over()
            finish_load(model, plan, places, destinations, timings, options.skip_keys, config)
            report = make_report(shards.held(), tensors.places(destinations.places), timings)
            model.quantization_report = report  # type: ignore[assignment]
            refuse_new_adapters(result)
    return result
