"""The hooks on their own: lending, giving back, casting."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from bigq.formats import TensorSpec
from bigq.offload.attach import attach
from bigq.offload.block import OffloadedBlock
from bigq.offload.hooks import Float32Hook, PlacementHook
from bigq.offload.prefetch import Prefetcher
from bigq.offload.space import OffloadSpace, is_file_backed

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
    block, prefetcher = OffloadedBlock(tensors, ahead=True), Prefetcher(CPU)
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
    assert not module._hf_hook.block.calls


def test_a_forward_that_is_called_directly_gives_back(offloaded):
    module, plain = offloaded
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="on purpose"):
        module.forward(x, fail=True)
    assert at_rest(module)
    assert torch.equal(module.forward(x), plain(x))
    assert at_rest(module)


def test_gives_back_after_an_interrupt(offloaded):
    module, plain = offloaded

    def interrupt(inner, args, output):
        raise KeyboardInterrupt

    handle = module.inner.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(torch.randn(3, 4))
    assert at_rest(module)
    handle.remove()
    x = torch.randn(3, 4)
    assert torch.equal(module(x), plain(x))


def test_an_inner_call_that_never_began_ends_nothing():
    """A pre-hook of torch refuses the inner call; the outer one goes on with what it was lent."""

    class Catching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x, again=True):
            if again:
                with pytest.raises(ValueError, match="refused"):
                    self(x, again=False)
            self.lent = self.weight
            return x * self.weight

    def refuse(module, args, kwargs):
        if kwargs:
            raise ValueError("refused")

    outer = Catching()
    rest = outer.weight
    block, prefetcher = OffloadedBlock([(outer, "weight")], ahead=True), Prefetcher(CPU)
    prefetcher.add(block)
    attach(outer, PlacementHook(CPU, block=block, prefetcher=prefetcher))
    outer.register_forward_pre_hook(refuse, with_kwargs=True)
    assert outer(torch.ones(2)).tolist() == [1.0, 1.0]
    assert outer.lent is not rest
    assert outer.weight is rest


def test_a_hook_on_top_that_raises_keeps_nothing_lent(offloaded):
    module, plain = offloaded

    class Failing(ModelHook):
        step = "pre"

        def pre_forward(self, module, *args, **kwargs):
            if self.step == "pre":
                raise ValueError("before")
            return args, kwargs

        def post_forward(self, module, output):
            if self.step == "post":
                raise ValueError("after")
            return output

    failing = Failing()
    add_hook_to_module(module, failing, append=True)
    x = torch.randn(3, 4)
    for failing.step in ("pre", "post"):
        for call in (module, module.forward):
            with pytest.raises(ValueError, match=r"before|after"):
                call(x)
            assert at_rest(module)
            assert not module._hf_hook.hooks[0].block.calls
    failing.step = "none"
    assert torch.equal(module(x), plain(x))
    assert at_rest(module)


def test_two_threads_share_what_is_lent(offloaded):
    module, plain = offloaded
    both_run = threading.Barrier(2)
    module.inner.register_forward_hook(lambda inner, args, output: output + 0 * both_run.wait(timeout=30))
    x = torch.randn(3, 4)
    with ThreadPoolExecutor(2) as threads:
        for out in threads.map(module, (x, x)):
            assert torch.equal(out, plain(x))
    assert len(set(module.seen)) == 1
    assert at_rest(module)


def test_two_hooks_come_off_together(offloaded):
    module, plain = offloaded
    attach(module, Float32Hook(restore=True))
    x = torch.randn(3, 4)
    assert torch.equal(module(x.half()), plain(x.half().float()).half())
    assert at_rest(module)
    remove_hook_from_module(module)
    assert module.forward == type(module).forward.__get__(module)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_module_with_two_hooks(offloaded, how):
    module, plain = offloaded
    attach(module, Float32Hook(restore=True))
    other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    x = torch.randn(3, 4)
    assert torch.equal(other(x.half()), plain(x.half().float()).half())
    assert other.seen != [] == module.seen, "a copy runs itself"
    rest = other.inner.weight
    other(x)
    assert other.inner.weight is rest
    assert other.seen[-1][0] != rest.data_ptr()
    remove_hook_from_module(other)
    assert torch.equal(other(x), plain(x))


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


def test_the_device_is_found_by_accelerates_name_for_it():
    assert PlacementHook(torch.device("meta")).execution_device == torch.device("meta")


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

    def test_two_threads_restore_their_own_dtypes(self):
        both_run = threading.Barrier(2)

        class Waiting(nn.Identity):
            def forward(self, x):
                both_run.wait(timeout=30)
                return x

        module = Waiting()
        add_hook_to_module(module, Float32Hook(restore=True))
        inputs = [torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
        for first, second in (inputs, inputs[::-1]):
            with ThreadPoolExecutor(2) as threads:
                assert [out.dtype for out in threads.map(module, (first, second))] == [first.dtype, second.dtype]

    def test_a_module_that_calls_itself_with_another_dtype(self):
        class Nested(nn.Module):
            def forward(self, x, inner=None):
                if inner is not None:
                    self.returned = self(inner).dtype
                return x

        module = Nested()
        add_hook_to_module(module, Float32Hook(restore=True))
        assert module(torch.ones(2).bfloat16(), torch.ones(2)).dtype == torch.bfloat16
        assert module.returned == torch.float32
        # inner half-precision tensors are cast up by the outer call, so the inner one restores nothing
        assert module(torch.ones(2), torch.ones(2).half()).dtype == torch.float16
        assert module.returned == torch.float32

    @pytest.mark.parametrize("how", ["call", "forward"])
    def test_a_call_that_raised_leaves_nothing_to_the_next(self, how):
        module = nn.LayerNorm(4)
        add_hook_to_module(module, Float32Hook(restore=True))
        call = module if how == "call" else module.forward
        with pytest.raises(RuntimeError, match="normalized_shape"):
            call(torch.ones(2, 5).half())
        assert call(torch.ones(2, 4)).dtype == torch.float32
        assert call(torch.ones(2, 4).bfloat16()).dtype == torch.bfloat16

    def test_it_compiles_into_one_graph(self):
        torch._dynamo.reset()
        module = nn.LayerNorm(4)
        attach(module, Float32Hook(restore=True))
        x = torch.randn(2, 4).bfloat16()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), module(x))
