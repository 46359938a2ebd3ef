"""A model of FSDP2 is refused, also while its tensors are whole, as they are after a call of its outermost module."""

import pytest
import torch
from torch import distributed, nn

from bigq import QuantizationConfig, UnsupportedError, load_and_quantize_model


def test_a_sharded_model_is_refused_after_a_call():
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(64, 64))
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        x = torch.ones(2, 64)
        out = model(x)
        assert not hasattr(model[0].weight, "to_local")
        config = QuantizationConfig("nf4", also_quantize=["0"])
        with pytest.raises(UnsupportedError, match="are sharded"):
            load_and_quantize_model(model, None, config, device_map="cpu")
        assert torch.equal(model(x), out)
    finally:
        distributed.destroy_process_group()
