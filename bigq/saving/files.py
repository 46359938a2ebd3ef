"""write_shards: tensors in safetensors files, each no larger than asked for, with an index if there are several."""

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import ConfigError

__all__ = ["write_shards"]

_INDEX = "model.safetensors.index.json"
_WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_shards(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    max_shard_size: int | str,
    metadata: Mapping[str, str],
    tied: Collection[str] = (),
) -> None:
    """Write `tensors` to `folder`, in place of the files that an earlier call wrote there.

    What lies on a GPU is copied to host memory for one file at a time. Of names for one tensor only one is written, if
    possible none of those called `tied`.

    Raises:
        ConfigError: `max_shard_size` is no size; nothing was written.
    """
    kept = _distinct(tensors, tied)
    try:
        split = split_torch_state_dict_into_shards(kept, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}; expected bytes, or a string such as '5GB'") from error
    for path in folder.iterdir():  # a model may be offloaded to one: it keeps the file open, which is still there
        if _WRITTEN.fullmatch(path.name):
            path.unlink()
    mode = _usual_mode(folder)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: kept[name].contiguous() for name in names}
        save_file(shard, folder / filename, {"format": "pt", **metadata})
        (folder / filename).chmod(mode)  # safetensors lets nobody but the owner read what it writes
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _distinct(tensors: Mapping[str, Tensor], tied: Collection[str]) -> dict[str, Tensor]:
    """`tensors` without a second name for the same numbers."""
    names: dict[object, str] = {}
    for name in sorted(tensors, key=set(tied).__contains__):  # stable: those that are tied come last
        tensor = tensors[name]
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        names.setdefault(same if tensor.numel() else name, name)
    kept = set(names.values())
    return {name: tensor for name, tensor in tensors.items() if name in kept}


def _usual_mode(folder: Path) -> int:
    """The permissions of a file that is written to `folder` as usual; the umask alone cannot be read without a race."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        probe = Path(scratch, "probe")
        probe.touch()
        return probe.stat().st_mode & 0o777
