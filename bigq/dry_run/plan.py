"""plan: the dry run of `load_and_quantize_model`, from headers alone."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from bigq.checkpoint import Adapter, Checkpoint, Source
from bigq.config import QuantizationConfig
from bigq.dry_run.load_plan import LoadPlan, describe_plan
from bigq.errors import ConfigError
from bigq.integrations.skeleton import build_skeleton
from bigq.interop.bitsandbytes_configs import as_config, is_config
from bigq.interop.bitsandbytes_models import refuse_bitsandbytes
from bigq.loading.unload import is_loaded, unloaded
from bigq.model.in_place import ModelTensors
from bigq.model.strays import refuse_strays
from bigq.model.transaction import Snapshot
from bigq.model.tree import ModelTree
from bigq.open_source import open_source, with_own_tensors
from bigq.planning.places import plan_and_place
from bigq.system.interrupts import to_the_end

__all__ = ["plan", "plan_model", "with_revision"]


def plan(
    model_or_id: nn.Module | str | os.PathLike[str],
    quantization_config: QuantizationConfig | object | None = None,
    device_map: str | int | torch.device | Mapping[str, int | str | torch.device] | None = None,
    *,
    weights_location: str | os.PathLike[str] | None = None,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: str | torch.dtype | None = None,
    strict: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    other_machine: bool = False,
) -> LoadPlan:
    """Say what `load_and_quantize_model` would make of every tensor and where it would store it. Nothing is loaded.

    Only headers are read. Of a Hub repo they are read by ranges of bytes, so no weights are downloaded. What the load
    would refuse, such as a tensor that is missing, is refused in the same words.

    Args:
        model_or_id: a model, on the meta device or with weights, which is not changed; or a folder with a config.json,
            or a Hub repo, as in `bigq.integrations.skeleton.build_skeleton`: then the model is made on the meta device,
            and its weights are those of that folder or repo unless `weights_location` says otherwise.
        quantization_config, device_map, no_split_module_classes, max_memory, offload_folder, offload, strict: as in
            `load_and_quantize_model`. Nothing is written to `offload_folder`.
        weights_location: as in `load_and_quantize_model`. None, with a model: its own tensors and their dtypes, also if
            they are on the meta device.
        revision: branch, tag or commit of the Hub repo.
        trust_remote_code: whether code that comes with the model may run.
        other_machine: whether `device_map` and `max_memory` may name GPUs that this machine does not have.

    Returns:
        The plan: a row for each tensor, and the bytes by device and kind. `print(plan.table())` shows it.

    Raises:
        CheckpointError, ConfigError, PlacementError, UnsupportedError: what the load would raise before it reads.

    Example:
        >>> import bigq, torch
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(3)))
        >>> config = bigq.QuantizationConfig("nf4", rules={"0": "int8"})
        >>> print(bigq.plan(model, config, device_map="cpu").table())
        name, without .weight  count    shape  from    to  device     MB
        rules '0':
          *                        1  256x256   f32  int8     cpu  0.067
        quantized:
          *                        1  256x256   f32   nf4     cpu  0.037
        the output head:
          *                        1  256x256   f32   f32     cpu  0.262
        <BLANKLINE>
        MB     packed  scales   kept    all
        cpu     0.098   0.006  0.262  0.366
        total   0.098   0.006  0.262  0.366
        <BLANKLINE>
        66.7% of 196,608 parameters are quantized
        786 KB become 366 KB, 14.90 bits a parameter
    """
    if is_config(model_or_id) and not isinstance(model_or_id, nn.Module) and not os.path.lexists(str(model_or_id)):
        raise ConfigError(f"the first argument is the config {model_or_id!r}; expected a model, a folder or a Hub repo")
    if isinstance(model_or_id, nn.Module):
        model, location = model_or_id, weights_location
    else:
        model = build_skeleton(model_or_id, revision=revision, trust_remote_code=trust_remote_code)
        location = weights_location if weights_location is not None else with_revision(model_or_id, revision)
    checkpoint = None if location is None else Checkpoint.open_headers(location, strict=strict)
    return plan_model(
        model,
        checkpoint,
        quantization_config,
        device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
        offload=offload,
        strict=strict,
        other_machine=other_machine,
    )


def plan_model(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    quantization_config: QuantizationConfig | object | None,
    device_map: object,
    *,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: str | torch.dtype | None = None,
    strict: bool = True,
    other_machine: bool = False,
) -> LoadPlan:
    """Make the plan of loading `checkpoint` into `model`; None: the model's own tensors. The rest is as in `plan`."""
    config = None if quantization_config is None else as_config(quantization_config, model)
    with _as_skeleton(model, unload=checkpoint is not None):
        tree = ModelTree(model)
        refuse_bitsandbytes(tree)
        source: Source
        if checkpoint is None:
            source = _Described(ModelTensors(model))
        else:
            source, _ = open_source(tree, checkpoint, strict=strict, config=config)
            source = source if strict else with_own_tensors(tree, source)
        planned, places = plan_and_place(
            tree,
            source,
            config,
            device_map,
            no_split_module_classes=no_split_module_classes,
            max_memory=max_memory,
            offload_folder=offload_folder,
            offload=offload,
            strict=strict,
            may_be_absent=other_machine,
        )
        quantized = {name for weight in planned.weights for name in weight.names}
        refuse_strays(tree, quantized, in_place=source.in_place)
        return describe_plan(tree, planned, places, source.tensors)


def with_revision(location: str | os.PathLike[str], revision: str | None) -> str | os.PathLike[str]:
    """The folder, or the id of a Hub repo with its `revision`."""
    if revision is None or os.path.lexists(location):
        return location
    return f"{str(location).partition('@')[0]}@{revision}"


class _Described(Adapter):
    """A source of which only the descriptions are wanted, so that its tensors may be on meta."""

    def __init__(self, source: ModelTensors) -> None:
        super().__init__(source)
        self.tensors, self.read = source.tensors, source.read

    def check(self) -> None:
        """Accept tensors on meta."""


@contextmanager
def _as_skeleton(model: nn.Module, *, unload: bool) -> Iterator[None]:
    """Make a model that was loaded, and would be loaded again, the skeleton that it was; restore it at the end."""
    tree = ModelTree(model)
    if not unload or not is_loaded(tree):
        yield
        return
    before = Snapshot(tree.modules.values())
    try:
        with unloaded(tree):
            yield
    finally:
        try:
            before.restore()
        except BaseException:  # also an interrupt as it is entered
            to_the_end(before.restore)
            raise
