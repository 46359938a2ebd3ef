"""Sources for tests."""

from collections.abc import Mapping, Sequence

import torch

from bigq.checkpoint import Conversion, Converted, Source


def stacked(source: Source, stacks: Mapping[str, Sequence[str]]) -> Converted:
    """`source` with tensors stacked: {new name: names of those that look alike}."""

    def stack(tensors):
        return [torch.stack(tensors)]

    return Converted(source, [Conversion(tuple(members), (name,), stack, True) for name, members in stacks.items()])
