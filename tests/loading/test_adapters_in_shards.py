"""NumbersStay: what has numbers does not lose them when it is sent to meta."""

import torch
from torch import nn

from bigq.loading.adapters_in_shards import NumbersStay


def test_what_has_numbers_stays_and_what_has_none_stays_on_meta():
    with NumbersStay(torch.device("cpu")):
        linear = nn.Linear(3, 2)
        weight = linear.weight.detach().clone()
        linear.to("meta", dtype=torch.float64)
        moved = torch.ones(2).to(device=torch.device("meta"))
        on_meta = torch.ones(2, device="meta").to("meta", torch.float16)
        cast = torch.ones(2).to(torch.float16)
        like = torch.ones(2).to(torch.zeros(1, dtype=torch.int32))
    assert torch.equal(linear.weight, weight.double())
    assert moved.tolist() == [1, 1]
    assert on_meta.is_meta
    assert on_meta.dtype == torch.float16
    assert (cast.dtype, like.dtype) == (torch.float16, torch.int32)


def test_outside_of_it_tensors_are_sent_to_meta():
    assert torch.ones(2).to("meta").is_meta
