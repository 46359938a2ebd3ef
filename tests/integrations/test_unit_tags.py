"""Tags of gathered units: one that another process has sent for another unit is an error."""

import pytest
import torch

from bigq import UnsupportedError
from bigq.integrations.unit_tags import TAG_NBYTES, Tags, tag_of

NAMES = ["embed", "blocks.0", "blocks.1"]


def _sent(*indices, device="cpu"):
    return torch.stack([tag_of(index) for index in indices]).to(device)


def test_a_tag_is_as_long_as_what_weights_are_aligned_to():
    assert tag_of(3).shape == (TAG_NBYTES,)
    assert tag_of(3).view(torch.int64).tolist() == [3] + [0] * 31


def test_tags_of_one_unit_raise_nothing():
    tags = Tags(NAMES)
    tags.arrive(1, _sent(1, 1, 1))
    tags.check(wait=True)


@pytest.mark.parametrize("other, name", [(0, "embed"), (2, "blocks.1"), (1 << 40, "another tensor"), (-1, "another")])
def test_the_tag_of_another_unit_is_an_error(other, name):
    with pytest.raises(UnsupportedError, match=f"gathered blocks.0 and process 2 of the mesh {name}"):
        Tags(NAMES).arrive(1, _sent(1, 1, other))


@pytest.mark.gpu
def test_tags_of_a_gpu_are_compared_once_they_have_come():
    tags = Tags(NAMES)
    for index in (0, 1, 2) * 30:  # more than memory is taken for at once
        tags.arrive(index, _sent(index, index, device="cuda"))
    tags.check(wait=True)
    tags.arrive(1, _sent(1, 2, device="cuda"))  # into memory that was used before
    torch.cuda.synchronize()
    with pytest.raises(UnsupportedError, match=r"gathered blocks\.0 and process 1 of the mesh blocks\.1"):
        tags.check()
    tags.check(wait=True)  # said once


@pytest.mark.gpu
def test_tags_are_not_compared_in_a_cuda_graph():
    tags, sent = Tags(NAMES), _sent(1, 2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sent.add_(0)  # torch warns of an empty graph
        tags.arrive(1, sent)
        tags.check()
    graph.replay()
    tags.check(wait=True)
