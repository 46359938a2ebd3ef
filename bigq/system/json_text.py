"""JSON as files of checkpoints hold it: read with the keys that it gives twice, which Python's parser does not say."""

import json
from collections import Counter

__all__ = ["parse_json"]


def parse_json(text: bytes) -> tuple[object, list[str]]:
    """What `text` says, and the keys that an object in it gives more than once; of their values the last one is said.

    Raises:
        ValueError: it is no JSON, no UTF-8, or nested beyond what Python reads.
    """
    repeated: list[str] = []

    def as_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return content

    try:
        return json.loads(text, object_pairs_hook=as_dict), repeated
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
