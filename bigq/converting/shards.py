"""make_shards: which tensors go into which file."""

from collections.abc import Iterable, Sequence

from accelerate.utils import convert_file_size_to_int

from bigq.converting.outline import Entry
from bigq.errors import ConfigError

__all__ = ["Shard", "make_shards", "size_of"]

Shard = Sequence[Entry]


def size_of(max_shard_size: int | str) -> int:
    """The bytes that `max_shard_size` says. Raises ConfigError if it says none."""
    try:
        nbytes = convert_file_size_to_int(max_shard_size)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}; expected bytes, or a string such as '5GB'") from error
    if nbytes < 1:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}; expected at least one byte")
    return int(nbytes)


def make_shards(entries: Iterable[Entry], max_nbytes: int, *, stem: str) -> dict[str, Shard]:
    """{name of a file: what goes into it}, in the order of `entries`: files of at most `max_nbytes`, or of one entry.

    The files are called `stem`, as the library of the model calls them. The tensors of a quantized weight stay
    together, so that one file is enough to read it.
    """
    shards: list[list[Entry]] = []
    left = 0
    for entry in entries:
        if not shards or entry.nbytes > left:
            shards.append([])
            left = max_nbytes
        shards[-1].append(entry)
        left -= entry.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)
    }
