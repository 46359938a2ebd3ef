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
from bigq.model.tree import tensor_key

__all__ = ["distinct", "index_text", "remove_weights", "write_shards"]

_INDEX = "model.safetensors.index.json"
_WRITTEN = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


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
    kept = distinct(tensors, tied)
    try:
        split = split_torch_state_dict_into_shards(kept, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}; expected bytes, or a string such as '5GB'") from error
    remove_weights(folder)  # a model may be offloaded to one: it keeps the file open, which is still there
    mode = _usual_mode(folder)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: kept[name].contiguous() for name in names}
        save_file(shard, folder / filename, {"format": "pt", **metadata})
        (folder / filename).chmod(mode)  # safetensors lets nobody but the owner read what it writes
    if split.is_sharded:
        text = index_text(split.tensor_to_filename, {**split.metadata, **metadata})
        (folder / _INDEX).write_text(text)


def remove_weights(folder: Path) -> None:
    """Remove the files of weights that an earlier call may have written to `folder`."""
    for path in folder.iterdir():
        if _WRITTEN.fullmatch(path.name):
            path.unlink()


def index_text(weight_map: Mapping[str, str], metadata: Mapping[str, object]) -> str:
    """The index of shards: `weight_map` says which file holds a tensor."""
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def distinct(tensors: Mapping[str, Tensor], tied: Collection[str]) -> dict[str, Tensor]:
    """`tensors` without a second name for the same numbers; of several names, if possible none of those called `tied`.

    On meta, where there are no numbers, those of one storage are the same.
    """
    names: dict[object, str] = {}
    for name in sorted(tensors, key=set(tied).__contains__):  # stable: those that are tied come last
        tensor = tensors[name]
        same = (
            tensor_key(tensor)
            if tensor.is_meta
            else (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        )
        names.setdefault(same if tensor.numel() else name, name)
    kept = set(names.values())
    return {name: tensor for name, tensor in tensors.items() if name in kept}


def _usual_mode(folder: Path) -> int:
    """The permissions of a file that is written to `folder` as usual; the umask alone cannot be read without a race."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        probe = Path(scratch, "probe")
        probe.touch()
        return probe.stat().st_mode & 0o777
