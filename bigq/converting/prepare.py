"""prepare: all of a quantized folder that is known before a weight is read: its files by name, and what is small."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigq.checkpoint.model_config import read_config
from bigq.config import QuantizationConfig
from bigq.converting.companions import card_data, copy_companions, find_companions, repository_of
from bigq.converting.outline import fill_with_meta, outline_of
from bigq.converting.shards import Shard, make_shards
from bigq.converting.staging import Staging
from bigq.errors import PlacementError
from bigq.formats import dtype_name
from bigq.interop.diffusers_model import introduce_to_diffusers
from bigq.interop.diffusers_names import is_diffusers_model
from bigq.interop.transformers_model import introduce, is_transformers_model
from bigq.model.transaction import Snapshot
from bigq.model.tree import ModelTree
from bigq.model_card import model_card
from bigq.planning.plan import Plan, PlannedWeight
from bigq.saving.layouts import OWN, Saved
from bigq.saving.model_config import write_configs
from bigq.system.interrupts import to_the_end
from bigq.system.memory import memory_of

__all__ = ["Request", "prepare", "refuse_too_little_space"]

_CONFIG, _CARD = "config.json", "README.md"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: the arguments of `quantize_checkpoint` that decide what is written, and where."""

    source: str | os.PathLike[str]
    destination: Path
    config: QuantizationConfig
    layout: str
    max_nbytes: int
    metadata: Mapping[str, str]
    overwrite: bool


def prepare(tree: ModelTree, plan: Plan, request: Request, files: Sequence[Path]) -> tuple[dict[str, Shard], Staging]:
    """Decide what goes into which file, and stage all files but those of weights. The model of `tree` stays as it is.

    Args:
        files: of the checkpoint.

    Raises:
        ConfigError: the destination holds other files, or a part of another run.
        UnsupportedError: the layout cannot hold a weight.
    """
    model, before = tree.model, Snapshot(tree.modules.values())
    is_diffusers = is_diffusers_model(model)
    try:
        fill_with_meta(tree, plan)
        introduce(model, request.config)
        introduce_to_diffusers(model, request.config)
        entries, saved = outline_of(tree, plan, request.layout)
        stem = "diffusion_pytorch_model" if is_diffusers else "model"
        shards = make_shards(entries, request.max_nbytes, stem=stem)
        staging = Staging(request.destination, _described(request, files, shards), overwrite=request.overwrite)
        if not staging.is_complete:
            _stage_configs(tree, request, saved, staging.folder)
    finally:
        try:
            before.restore()
        except BaseException:  # also an interrupt as it is entered
            to_the_end(before.restore)
            raise
    return shards, staging


def refuse_too_little_space(shards: Mapping[str, Shard], staging: Staging) -> None:
    """Raise a PlacementError if the disk has too little space for the files of `shards` that are not done."""
    needed = sum(entry.nbytes for name, shard in shards.items() if name not in staging.done for entry in shard)
    # what lies there of a file that was not finished is written over
    free = shutil.disk_usage(staging.folder).free + sum(
        path.stat().st_size for name in shards if (path := staging.folder / name).is_file() and name not in staging.done
    )
    if needed > free:
        raise PlacementError(
            f"{staging.destination} has {free:,} bytes of free space, and the weights take {needed:,}: make space, or "
            "choose a folder on another disk"
        )


def _stage_configs(tree: ModelTree, request: Request, saved: Saved, folder: Path) -> None:
    beside = find_companions(request.source)
    quantization_config = saved.quantization_config
    if not is_transformers_model(tree.model):
        if beside is not None and (beside / _CONFIG).is_file():
            _copy_config(beside / _CONFIG, folder / _CONFIG)
        if quantization_config is None and is_diffusers_model(tree.model):
            quantization_config = request.config.to_dict()
    write_configs(tree.model, folder, quantization_config)
    if beside is not None:
        copy_companions(beside, folder)  # generation_config.json of the source says more than that of the skeleton
    repository = repository_of(request.source)
    card = model_card(tree.model, base_model=None if repository is None else repository.id)
    said = card_data(beside)
    if request.layout != OWN:  # a tag says which library loads the model
        tags: list[str] = vars(card.data)["tags"]
        said["tags"] = [request.layout if tag == OWN else tag for tag in tags]
    for name, value in said.items():
        setattr(card.data, name, value)
    card.save(folder / _CARD)


def _copy_config(path: Path, copy: Path) -> None:
    """Copy a config.json, but for how the weights were quantized that have been decoded."""
    content = read_config(path)
    if content.pop("quantization_config", None) is None:
        shutil.copyfile(path, copy)
    else:
        copy.write_text(json.dumps(content, indent=2) + "\n")


def _described(request: Request, files: Sequence[Path], shards: Mapping[str, Shard]) -> dict[str, object]:
    """What decides the content of the files of weights, as JSON can hold it."""
    stats = [(path.name, path.stat()) for path in files]
    return {
        "the source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "the quantization_config": request.config.to_dict(),
        "the moments": _moments_digest(shards),
        "the layout": request.layout,
        "the metadata": dict(request.metadata),
        "the model or max_shard_size": {
            file: [
                [name, list(spec.shape), dtype_name(spec.dtype)]
                for entry in shard
                for name, spec in entry.specs.items()
            ]
            for file, shard in shards.items()
        },
    }


def _moments_digest(shards: Mapping[str, Shard]) -> str:
    """What tells the importance of input features, by which scales are searched, from others."""
    digest = hashlib.sha256()
    for shard in shards.values():
        for entry in shard:
            if isinstance(entry.planned, PlannedWeight) and entry.planned.importance is not None:
                digest.update(entry.planned.names[0].encode())
                digest.update(memory_of(entry.planned.importance.contiguous()))
    return digest.hexdigest()
