"""inspect_checkpoint: who quantized a checkpoint and how, what it holds, and whether bigq reads it; from headers."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigq.checkpoint import FLOAT8, Checkpoint, decoded_method, foreign_method, refuse_foreign, scale_beside
from bigq.checkpoint.gguf import is_gguf, read_gguf
from bigq.checkpoint.model_config import read_config
from bigq.dry_run.held_weights import held_weights
from bigq.dry_run.limits import as_limits
from bigq.errors import CheckpointError
from bigq.formats import dtype_name
from bigq.system.text import shortlist

__all__ = ["CheckpointSummary", "WeightGroup", "inspect_checkpoint"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_SHOWN_SETTINGS = 20  # of a foreign quantization_config, whose lists of modules may be long


@dataclass(frozen=True, kw_only=True)
class WeightGroup:
    """Tensors of one format whose names differ by a number alone, such as those of each layer.

    Args:
        name: with "*" for the number.
        format: the format of quantized weights, or the dtype of other tensors.
        is_quantized: whether they are quantized weights.
        count: how many weights or tensors there are.
        parameters: their elements, of quantized weights the original ones; None if headers and configs do not say it.
        nbytes: bytes in the files; of quantized weights with everything that belongs to them.
    """

    name: str
    format: str
    is_quantized: bool
    count: int
    parameters: int | None
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """What `inspect_checkpoint` found out.

    Args:
        location: as it was given.
        files: the names of its files of weights.
        model: the class that config.json names; None if it names none.
        quantized_by: "bigq", "bitsandbytes", or the name of another method; None if it is not quantized.
        settings: what config.json says of the quantization.
        groups: tensors by name and format, in the order of the files.
        parameters: elements of all tensors, of quantized weights the original ones; None if it is not known.
        nbytes: bytes of all tensors.
        is_readable: whether bigq loads it.
        advice: how to load it, or what to do instead.
        limits: {device: bytes} that the weights are compared with: those that were given, or the free memory of this
            machine's GPUs; empty if there is neither.
        fits: whether all tensors as they are fit into the GPUs of `limits` together, or into its CPU if it names no
            GPU; None if `limits` is empty.
    """

    location: str
    files: tuple[str, ...]
    model: str | None
    quantized_by: str | None
    settings: Mapping[str, object] = field(default_factory=dict)
    groups: tuple[WeightGroup, ...]
    parameters: int | None
    nbytes: int
    is_readable: bool
    advice: str
    limits: Mapping[str, int] = field(default_factory=dict)
    fits: bool | None = None

    @property
    def formats(self) -> dict[str, dict[str, int | None]]:
        """{format or dtype: {"count", "parameters", "nbytes"}} over all groups."""
        found: dict[str, dict[str, int | None]] = {}
        for group in self.groups:
            row = found.setdefault(group.format, {"count": 0, "parameters": 0, "nbytes": 0})
            for name in ("count", "parameters", "nbytes"):
                before, more = row[name], getattr(group, name)
                row[name] = None if before is None or more is None else before + more
        return found

    @property
    def bits(self) -> float | None:
        """Bits of all files for a parameter, scales and all; None if the number of parameters is not known."""
        return 8 * self.nbytes / self.parameters if self.parameters else None

    def to_dict(self) -> dict[str, object]:
        """The summary as JSON can hold it."""
        return {**asdict(self), "formats": self.formats, "bits": self.bits}


def inspect_checkpoint(
    location: str | os.PathLike[str], *, max_memory: Mapping[int | str, int | str] | None = None
) -> CheckpointSummary:
    """Say who quantized a checkpoint and how, what it holds, and whether bigq reads it. Reads headers and config.json.

    Args:
        location: as `weights_location` of `load_and_quantize_model`, or a GGUF file, or a folder of these. Of a Hub
            repo, only headers and configs are downloaded.
        max_memory: {GPU index or "cpu": bytes, or a string such as "12GiB"} to compare with; the GPUs need not be
            those of this machine. None: the free memory of this machine's GPUs.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.

    Example:
        >>> import tempfile
        >>> import bigq, torch
        >>> from bigq.dry_run.inspect_checkpoint import inspect_checkpoint
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> model = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4"), "cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bigq.save_quantized(model, folder)
        ...     found = inspect_checkpoint(folder)
        >>> found.quantized_by, found.is_readable, found.parameters
        ('bigq', True, 8320)
    """
    limits = _limits(max_memory)
    gguf = _gguf_files(location)
    found = _of_gguf(location, gguf) if gguf else _of_tensors(location)
    on_gpus = [nbytes for device, nbytes in limits.items() if device.startswith("cuda:")]
    room = sum(on_gpus) if on_gpus else limits.get("cpu")
    return CheckpointSummary(**found, limits=limits, fits=None if room is None else found["nbytes"] <= room)


def _of_tensors(location: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the summary of a checkpoint of safetensors or pickles."""
    checkpoint = Checkpoint.open_headers(location, strict=False, refuse=False)
    folder = checkpoint.files[0].parent
    config = read_config(folder / "config.json")
    said = config.get("quantization_config")
    settings = said if isinstance(said, dict) else {}
    tensors = checkpoint.tensors
    decoded = decoded_method(tensors, settings)
    method = foreign_method(folder, tensors) or decoded
    if method is None and any(
        stored.dtype in FLOAT8 and scale_beside(name, tensors) for name, stored in tensors.items()
    ):
        method = "FP8 with scales"
    weights = held_weights(checkpoint, method, settings)
    rows: dict[tuple[str, str, bool], list[tuple[int | None, int]]] = {}
    members: set[str] = set()
    for weight in weights:
        members.update(weight.members)
        nbytes = sum(tensors[name].nbytes for name in weight.members)
        rows.setdefault((_folded(weight.name), weight.format, True), []).append((weight.numel, nbytes))
    is_unknown = method is not None and not weights  # its codes have names that are not known here
    for name, stored in tensors.items():
        if name not in members:
            numel = None if is_unknown and not stored.dtype.is_floating_point else stored.shape.numel()
            rows.setdefault((_folded(name), dtype_name(stored.dtype), False), []).append((numel, stored.nbytes))
    quantized_by = weights[0].by if weights else method
    advice, is_readable = _advice(str(location), folder, checkpoint, quantized_by, is_decoded=decoded is not None)
    groups = _groups(rows)
    return {
        "location": str(location),
        "files": tuple(path.name for path in checkpoint.files),
        "model": _class_named(config),
        "quantized_by": quantized_by,
        "settings": dict(list(settings.items())[:_SHOWN_SETTINGS]),
        "groups": groups,
        "parameters": _sum(group.parameters for group in groups),
        "nbytes": checkpoint.nbytes,
        "is_readable": is_readable,
        "advice": advice,
    }


def _advice(
    location: str, folder: Path, checkpoint: Checkpoint, quantized_by: str | None, *, is_decoded: bool
) -> tuple[str, bool]:
    """What to do with the checkpoint, and whether bigq reads it."""
    load = f"load it with bigq.load_and_quantize_model(model, {location!r})"
    try:
        refuse_foreign(folder, checkpoint.tensors)
    except CheckpointError as error:
        return str(error), False
    if quantized_by is None:
        return f"bigq quantizes it while it loads it; `bigq estimate {location}` says how large it becomes", True
    if quantized_by == "bigq":
        return f"{load}; no config is needed", True
    if quantized_by == "bitsandbytes":
        known = "bigq.integrations.transformers.use_as_bitsandbytes()"
        return f"{load}, or with from_pretrained after {known}", True
    if is_decoded:
        return (
            "bigq decodes it while it loads it, and quantizes its linears if a config is passed; "
            f"`bigq estimate {location}` says how large it becomes"
        ), True
    return (
        f"{location} holds {quantized_by}, which bigq does not read; take the original weights of the model and "
        "quantize those, or load these with transformers"
    ), False


def _of_gguf(location: str | os.PathLike[str], paths: list[Path]) -> dict[str, Any]:
    """The fields of the summary of GGUF files, each of which is a model of its own or a part of one."""
    rows: dict[tuple[str, str, bool], list[tuple[int | None, int]]] = {}
    said: dict[str, object] = {}
    for path in paths:
        metadata, tensors = read_gguf(path)
        said |= metadata
        for tensor in tensors:
            is_quantized = tensor.format not in ("F32", "F16", "BF16", "F64")
            numel = torch.Size(tensor.shape).numel()
            rows.setdefault((_folded(tensor.name), tensor.format, is_quantized), []).append((numel, tensor.nbytes))
    groups = _groups(rows)
    named = {key: value for key, value in said.items() if key.startswith("general.")}
    return {
        "location": str(location),
        "files": tuple(path.name for path in paths),
        "model": str(said["general.architecture"]) if "general.architecture" in said else None,
        "quantized_by": "GGUF of llama.cpp" if any(group.is_quantized for group in groups) else None,
        "settings": named,
        "groups": groups,
        "parameters": _sum(group.parameters for group in groups),
        "nbytes": sum(group.nbytes for group in groups),
        "is_readable": False,
        "advice": "bigq does not read GGUF; take the original weights of the model, as safetensors",
    }


def _gguf_files(location: str | os.PathLike[str]) -> list[Path]:
    """The GGUF files at `location`: the file itself, or those of a folder that holds no other weights."""
    path = Path(location)
    if path.is_file():
        return [path] if is_gguf(path) else []
    if not path.is_dir():
        return []
    files = sorted(path.iterdir())
    others = any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in files)
    return [] if others else [file for file in files if file.suffix == ".gguf"]


def _groups(rows: Mapping[tuple[str, str, bool], list[tuple[int | None, int]]]) -> tuple[WeightGroup, ...]:
    return tuple(
        WeightGroup(
            name=name,
            format=kind,
            is_quantized=is_quantized,
            count=len(held),
            parameters=_sum(numel for numel, _ in held),
            nbytes=sum(nbytes for _, nbytes in held),
        )
        for (name, kind, is_quantized), held in rows.items()
    )


def _sum(numbers: Any) -> int | None:
    """The sum of `numbers`; None if one of them is None."""
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def _folded(name: str) -> str:
    return _NUMBER.sub("*", name)


def _class_named(config: Mapping[str, object]) -> str | None:
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return shortlist(named, limit=3)
    said = config.get("_class_name") or config.get("model_type")
    return said if isinstance(said, str) else None


def _limits(max_memory: Mapping[int | str, int | str] | None) -> dict[str, int]:
    """{device: bytes} as asked for, or of this machine's GPUs."""
    if max_memory is not None:
        return as_limits(max_memory)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return as_limits({index: torch.cuda.mem_get_info(index)[0] for index in range(count)})
