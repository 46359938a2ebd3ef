"""The index of a sharded checkpoint: a JSON file that says which file holds which tensor."""

from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from reprlib import repr as short  # of what a file says, which may be of any length and depth

from bigq.errors import CheckpointError
from bigq.system.json_text import parse_json
from bigq.system.text import shortlist

__all__ = ["read_index"]


def read_index(path: Path) -> dict[str, str]:
    """Map each tensor name to the name of its file, relative to the folder of the index.

    Both forms are read: an object with a `weight_map`, and the bare map.
    """
    try:
        content, twice = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read the index {path}: {error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"the index {path} is not valid JSON ({error}): it is half-written or damaged; download or save it again"
        ) from error

    weight_map = content.get("weight_map", content) if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"the index {path} has no weight map: expected an object of tensor names and file names, "
            "bare or under the key 'weight_map'"
        )
    if twice:
        raise CheckpointError(f"the index {path} gives {shortlist(list(map(repr, twice)))} twice; which is meant?")
    wrong = [name for name, file in weight_map.items() if not isinstance(file, str)]
    if wrong:
        raise CheckpointError(
            f"the index {path} is not a map of tensor names to file names: "
            f"{short(wrong[0])} maps to {short(weight_map[wrong[0]])}"
        )
    outside = sorted(file for file in set(weight_map.values()) if not _stays_inside(file))
    if outside:
        raise CheckpointError(
            f"the index {path} names files outside its own folder: {shortlist(list(map(repr, outside)))}; "
            "refused, because a checkpoint may only name files beside its index"
        )
    return weight_map


def _stays_inside(file: str) -> bool:
    """Whether a file name is relative and never climbs, read as a POSIX path and as a Windows one."""
    paths: tuple[PurePath, ...] = (PurePosixPath(file), PureWindowsPath(file))
    return all(path.parts and not path.anchor and ".." not in path.parts for path in paths)
