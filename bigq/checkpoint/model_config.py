"""A config.json beside weights: what it says, as long as it says anything."""

from pathlib import Path

from bigq.system.json_text import parse_json

__all__ = ["read_config"]


def read_config(path: Path) -> dict[str, object]:
    """The object in a JSON file; an empty one where there is none, or no such file."""
    if not path.is_file():  # a pipe by that name would never end
        return {}
    try:
        content, _ = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
