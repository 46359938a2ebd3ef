"""The hooks on their own: lending, giving back, casting."""

import copy

import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn

from bigq.attach import attach
from bigq.formats import TensorSpec
from bigq.hooks import Float32Hook, PlacementHook
from bigq.offload import OffloadSpace, is_file_backed
from bigq.prefetch import Block, Prefetcher

CPU = torch.device("cpu")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.seen = []

    def forward(self, x, depth=0, fail=False):
        self.seen.append((self.inner.weight.data_ptr(), is_file_backed(self.inner.weight)))
        if fail:
            raise ValueError("on purpose")
        x = self.inner(x) * self.scale
        return self(x, depth - 1) if depth else x


@pytest.fixture
def offloaded(tmp_path):
    """(module with every tensor in a file and a hook to lend them, the same module without)."""
    plain = Scaled()
    module = copy.deepcopy(plain)
    tensors = [(module.inner, "weight"), (module.inner, "bias"), (module, "scale")]
    specs = {n: TensorSpec(shape=tuple(getattr(o, n).shape), dtype=torch.float32) for o, n in tensors}
    file = OffloadSpace.in_file(tmp_path, specs)
    for owner, name in tensors:
        value = getattr(owner, name)
        rest = file.empty(name).copy_(value.detach())
        table = owner._parameters if name in owner._parameters else owner._buffers
        table[name] = nn.Parameter(rest, requires_grad=False) if table is owner._parameters else rest
    block, prefetcher = Block(tensors, ahead=True), Prefetcher(CPU)
    prefetcher.add(block)
    attach(module, PlacementHook(CPU, block=block, prefetcher=prefetcher))
    return module, plain


def at_rest(module):
    return all(is_file_backed(t) for t in (module.inner.weight, module.inner.bias, module.scale))


def test_lends_for_the_length_of_the_call(offloaded):
    module, plain = offloaded
    x = torch.randn(3, 4)
    rest = module.inner.weight
    assert at_rest(module)
    assert torch.equal(module(x), plain(x))
    assert module.inner.weight is rest
    assert at_rest(module)
    ((address, backed),) = module.seen
    assert not backed
    assert address != rest.data_ptr()


def test_gives_back_after_an_exception(offloaded):
    module, plain = offloaded
    x = torch.randn(3, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            module(x, fail=True)
        assert at_rest(module)
    assert torch.equal(module(x), plain(x))
    assert at_rest(module)


def test_a_module_that_calls_itself_borrows_once(offloaded):
    module, plain = offloaded
    x = torch.randn(3, 4)
    assert torch.equal(module(x, depth=3), plain(x, depth=3))
    assert len(set(module.seen)) == 1
    assert at_rest(module)


def test_an_exception_inside_a_recursive_call(offloaded):
    module, _ = offloaded

    def fail_at_two(inner, args, output):
        if len(module.seen) == 3:
            raise ValueError("deep")

    module.inner.register_forward_hook(fail_at_two)
    with pytest.raises(ValueError, match="deep"):
        module(torch.randn(3, 4), depth=4)
    assert at_rest(module)
    assert module._hf_hook.block.calls == 0


def test_what_is_lent_is_frozen_and_gradients_pass_through(offloaded):
    module, plain = offloaded
    x = torch.randn(3, 4, requires_grad=True)
    module(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    plain(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert all(p.grad is None for p in module.parameters())


def test_copies_lend_their_own_tensors(offloaded):
    module, plain = offloaded
    other = copy.deepcopy(module)
    other.inner.weight.data.zero_()
    x = torch.randn(3, 4)
    assert torch.equal(module(x), plain(x))
    assert torch.equal(other(x), (plain.inner.bias * plain.scale).expand(3, 4))


def test_state_dict_needs_no_special_case(offloaded):
    module, plain = offloaded
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


def test_removal(offloaded):
    module, plain = offloaded
    remove_hook_from_module(module)
    x = torch.randn(3, 4)
    assert torch.equal(module(x), plain(x))
    assert not module._forward_hooks
    assert module.seen[-1][1], "without the hook it runs on what it holds"


class TestFloat32:
    def module(self, restore):
        module = nn.LayerNorm(4)
        add_hook_to_module(module, Float32Hook(restore=restore))
        return module

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_restores_the_dtype_of_the_input(self, dtype):
        x = torch.randn(2, 4).to(dtype)
        expected = nn.functional.layer_norm(x.float(), (4,))
        assert torch.equal(self.module(True)(x), expected.to(dtype))
        assert torch.equal(self.module(False)(x), expected)

    def test_float32_passes(self):
        x = torch.randn(2, 4)
        assert self.module(True)(x).dtype == torch.float32

    def test_every_call_stands_alone(self):
        module = self.module(True)
        assert module(torch.randn(2, 4).half()).dtype == torch.float16
        assert module(torch.randn(2, 4)).dtype == torch.float32
