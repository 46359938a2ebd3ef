"""fuse_linears: linears that read the same tensor are one launch, with the same numbers, and each still is a linear."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from bigq import QuantizationConfig, UnsupportedError, fuse_linears, load_and_quantize_model, unfuse_linears
from bigq.system.internals import SEES_EDITS
from bigq.weight import fused_rows, linear
from bigq.weight.fused_rows import MAX_TOKENS, TELLS_EXPORT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
sees_edits = pytest.mark.skipif(not SEES_EDITS, reason="without versions of tensors each linear computes by itself")
WIDTH = 64


class Attention(nn.Module):
    """q, k and v read x, `out` something else, and gate and up read x's sum with it; `between` is called after q."""

    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, rows, bias=bias) for rows in (64, 32, 32))
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.gate, self.up = nn.Linear(WIDTH, 96, bias=bias), nn.Linear(WIDTH, 96, bias=bias)
        self.between = None

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            self.between(self, x)
        k, v = self.k(x), self.v(x)
        x = x + self.out(q * torch.cat([k, v], dim=-1))
        return self.gate(x).sigmoid() * self.up(x)


def quantized(config="nf4", bias=True, dtype=torch.float32):
    config = QuantizationConfig(config) if isinstance(config, str) else config
    config = replace(config, skip_defaults=False)  # it would keep the last linear, as an output head
    model = Attention(bias).to(dtype).eval().requires_grad_(False)
    return load_and_quantize_model(model, None, config, DEVICE)


def tokens(count=1, dtype=torch.float32):
    return torch.randn(count, WIDTH, device=DEVICE, dtype=dtype)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def products(monkeypatch):
    """The numbers of rows of the weights that are multiplied by, in their order."""
    rows = []

    def multiply(own, x, product, tensors, compute_dtype):
        rows.append(tensors[0].shape[0])
        return own(x, product, tensors, compute_dtype)

    for module in (fused_rows, linear):
        monkeypatch.setattr(module, "multiply", partial(multiply, module.multiply))
    return rows


FUSED, APART = [128, 64, 192], [64, 32, 32, 64, 96, 96]
GROUPS = [("q", "k", "v"), ("gate", "up")]


@sees_edits
@pytest.mark.parametrize("count", [1, 2, MAX_TOKENS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "config", ["nf4", "fp4", "int8", QuantizationConfig("nf4", compute_dtype=torch.float16)], ids=str
)
def test_a_group_is_one_launch_with_the_same_numbers(products, config, bias, count):
    model, x = quantized(config, bias), tokens(count)
    expected = model(x)
    assert products == APART
    assert fuse_linears(model, tokens(3)).groups == GROUPS
    products.clear()
    found = model(x)
    assert products == FUSED
    torch.testing.assert_close(found, expected)
    unfuse_linears(model)
    assert torch.equal(model(x), expected)
    assert products == FUSED + APART


def test_parts_are_contiguous(products):
    model = quantized()
    fuse_linears(model, tokens())
    for x in (tokens(), tokens(4), tokens(4).view(2, 2, WIDTH), tokens()[0]):
        products.clear()
        parts = [model.q(x), model.k(x), model.v(x)]
        assert not SEES_EDITS or products == [128]
        assert [part.shape for part in parts] == [(*x.shape[:-1], rows) for rows in (64, 32, 32)]
        assert all(part.is_contiguous() for part in parts)


def test_parameters_are_what_they_were():
    model = quantized()
    held, before = dict(model.named_parameters()), {name: t.clone() for name, t in model.state_dict().items()}
    fuse_linears(model, tokens())
    assert all(own is held[name] for name, own in model.named_parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_every_tensor_has_a_storage_of_its_own():
    """What is saved by storages, or with them, is neither less nor more than before."""
    model = quantized()
    fuse_linears(model, tokens())
    parameters = [p for p in model.parameters() if p.numel()]
    starts = {p.untyped_storage().data_ptr() for p in parameters}
    assert len(starts) == len(parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)


def test_rows_lie_one_behind_the_other():
    model = quantized()
    fuse_linears(model, tokens())
    for name in ("weight_packed", "weight_absmax", "bias"):
        q, k, v = (getattr(module, name) for module in (model.q, model.k, model.v))
        assert q.data_ptr() + q.nbytes == k.data_ptr()
        assert k.data_ptr() + k.nbytes == v.data_ptr()


def test_a_saved_model_is_loaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = quantized(), tokens()
    expected = model(x)
    fuse_linears(model, x)
    accelerate.Accelerator().save_model(model, str(tmp_path))
    again = quantized()
    accelerate.load_checkpoint_in_model(again, str(tmp_path))
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_by_itself(products, copied):
    model, x = quantized(), tokens()
    fuse_linears(model, x)
    expected, again = model(x), copied(model)
    products.clear()
    torch.testing.assert_close(again(x), expected)
    assert products == APART


@sees_edits
def test_more_tokens_and_gradients_are_left_to_each_linear(products):
    model = quantized()
    fuse_linears(model, tokens())
    products.clear()
    model(tokens(MAX_TOKENS + 1))
    with torch.enable_grad():
        x = tokens().requires_grad_()
        grad = torch.autograd.grad(model(x).sum(), x)[0]
    assert products == 2 * APART
    unfuse_linears(model)
    with torch.enable_grad():
        assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], grad)


def _another_tensor(model, x):
    model.q(tokens())


def _write_to_the_tensor(model, x):
    x.mul_(2)


def _write_to_a_weight(model, x):
    model.k.weight.mul_(2)
    model.v.bias.add_(1)


def _other_weights(model, x):
    model.k.weight = torch.ones(32, WIDTH, device=DEVICE)


def _out_of_memory(model, x):
    model.v.weight_packed.data = model.v.weight_packed.data.clone()


def _autocast(model, x):
    torch.set_autocast_enabled(DEVICE.type, True)


@pytest.mark.parametrize(
    "between",
    [_another_tensor, _write_to_the_tensor, _write_to_a_weight, _other_weights, _out_of_memory, _autocast],
)
def test_what_happens_between_two_linears_is_seen(between):
    apart, x = quantized(), tokens()
    model = copy.deepcopy(apart)
    fuse_linears(model, tokens())
    apart.between = model.between = between
    try:
        expected = apart(x.clone())
        torch.set_autocast_enabled(DEVICE.type, False)
        torch.manual_seed(0)
        found = model(x.clone())
    finally:
        torch.set_autocast_enabled(DEVICE.type, False)
    torch.testing.assert_close(found, expected)
    apart.between = model.between = None
    torch.testing.assert_close(model(x), apart(x))


@sees_edits
def test_writes_to_a_weight_are_in_the_next_product(products):
    model, x = quantized(), tokens()
    fuse_linears(model, x)
    model.up.weight.copy_(torch.ones(96, WIDTH, device=DEVICE))
    model.load_state_dict({"gate.weight": torch.ones(96, WIDTH, device=DEVICE)}, strict=False)
    products.clear()
    found = model(x)
    assert products == FUSED
    unfuse_linears(model)
    torch.testing.assert_close(model(x), found)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),  # casts the biases
        lambda model: setattr(model.k, "weight", torch.ones(32, WIDTH, device=DEVICE)),
        lambda model: setattr(model.v.weight_packed, "data", model.v.weight_packed.clone()),
        lambda model: model.load_state_dict(
            {name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True
        ),
    ],
    ids=["half", "assign", "data", "load"],
)
def test_a_change_of_one_linear_lets_go_of_the_memory(products, change):
    model = quantized()
    fuse_linears(model, tokens())
    rows = model.q._fused.rows
    change(model)
    x = tokens(dtype=model.q.bias.dtype)
    model(x)
    products.clear()
    found = model(x)
    if SEES_EDITS:
        assert rows.whole == ()
    assert products[:3] == APART[:3]
    unfuse_linears(model)
    assert torch.equal(model(x), found)
    fuse_linears(model, x)
    torch.testing.assert_close(model(x), found)


def test_the_compute_dtype_of_a_checkpoint_is_taken_over(products):
    model, x = quantized(), tokens()
    other = quantized(QuantizationConfig("nf4", compute_dtype=torch.float16))
    fuse_linears(model, x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


def test_a_call_with_other_tensors_is_computed_with_them():
    model, x = quantized(), tokens()
    fuse_linears(model, x)
    other = {name: tensor.clone() for name, tensor in quantized().named_parameters()}
    found = torch.func.functional_call(model, other, (x,))
    unfuse_linears(model)
    torch.testing.assert_close(found, torch.func.functional_call(model, other, (x,)))


def test_adapters_are_added_to_a_part(products):
    peft = pytest.importorskip("peft")
    model, x = quantized(), tokens()
    config = peft.LoraConfig(target_modules=["q", "v", "up"], init_lora_weights=False)
    expected = peft.get_peft_model(copy.deepcopy(model), config)
    adapted = peft.get_peft_model(model, config)
    adapted.load_state_dict(expected.state_dict())
    names = fuse_linears(adapted, x).groups
    assert [[name.split(".")[2] for name in group] for group in names] == [["q", "k", "v"], ["gate", "up"]]
    products.clear()
    found = adapted(x)
    assert not SEES_EDITS or products == FUSED
    torch.testing.assert_close(found, expected(x))
    adapted.merge_adapter()
    expected.merge_adapter()
    torch.testing.assert_close(adapted(x), expected(x))


def test_compiled_code_has_an_op_for_each_launch():
    model, x = quantized(), tokens()
    expected = model(x)
    fuse_linears(model, x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected)
    assert sum("bigq.linear" in str(node.target) for node in graphs[0].graph.nodes) == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        model(x)
        compiled(tokens())
    x = tokens(4)
    torch.testing.assert_close(compiled(x), model(x))
    assert sum("bigq.linear" in str(node.target) for node in graphs[1].graph.nodes) == 6
    model.k.weight = torch.ones(32, WIDTH, device=DEVICE)
    found = compiled(x[:1])
    unfuse_linears(model)
    torch.testing.assert_close(found, model(x[:1]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_each_linear(strict):
    model, x = quantized(), tokens()
    fuse_linears(model, x)
    if strict and not TELLS_EXPORT:
        unfuse_linears(model)
    program = torch.export.export(model, (x,), strict=strict)
    assert sum("bigq.linear" in str(node.target) for node in program.graph.nodes) == 6
    torch.testing.assert_close(program.module()(x), model(x))


def test_what_is_called_twice_has_to_be_called_alike():
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            y = self.inner.q(x) * self.inner.out(x)
            return self.inner.q(y) * torch.cat([self.inner.k(y), self.inner.v(y)], dim=-1)

    model = Twice(quantized())
    x = tokens()
    expected = model(x)
    with pytest.raises(UnsupportedError, match="no two of them were called"):
        fuse_linears(model, x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_is_written_to_is_another(mode):
    model = quantized()
    model.between = _write_to_the_tensor
    with mode():
        x = tokens()
        expected = model(x.clone())
        assert fuse_linears(model, x.clone()).groups == [("k", "v"), ("gate", "up")]
        torch.testing.assert_close(model(x), expected)


def test_linears_of_other_formats_are_no_part_of_a_group():
    model = quantized(QuantizationConfig("nf4", rules={"k": "int8", "gate": "int8"}))
    fused = fuse_linears(model, tokens())
    assert fused.groups == [("q", "v")]
    assert fused.left == {}
    x = tokens()
    found = model(x)
    unfuse_linears(model)
    torch.testing.assert_close(model(x), found)


def test_refusals_say_why():
    with pytest.raises(UnsupportedError, match=r"q, k, v: NF4\(.*double_quant=True\) stores numbers of a whole weight"):
        fuse_linears(quantized(QuantizationConfig("nf4", double_quant=True)), tokens())
    tied = quantized()
    tied.up.weight = tied.gate.weight
    assert fuse_linears(tied, tokens()).left == {("gate", "up"): "they are tied"}
    with pytest.raises(UnsupportedError, match="0 quantized linears, of which 0 were called"):
        fuse_linears(Attention().to(DEVICE), tokens())


def test_offloaded_linears_compute_by_themselves():
    accelerate = pytest.importorskip("accelerate")
    model, x = quantized(), tokens()
    expected = model(x)
    fuse_linears(model, x)
    rows = model.q._fused.rows
    accelerate.cpu_offload(model, DEVICE)
    torch.testing.assert_close(model(x), expected)
    assert not SEES_EDITS or rows.whole == ()  # else their memory would stay on the GPU
    with pytest.raises(UnsupportedError, match="one of them is offloaded"):
        fuse_linears(model, x)
    torch.testing.assert_close(model(x), expected)


def test_a_model_that_is_moved_in_its_call_is_fused():
    accelerate = pytest.importorskip("accelerate")
    model, x = quantized(), tokens()
    expected = model(x)
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device=DEVICE)
    assert fuse_linears(model, x).groups == GROUPS
    torch.testing.assert_close(model(x), expected)
    hook.remove()


def test_a_part_is_given_away_once():
    model, x = quantized(), tokens()
    expected = model.k(x)
    fuse_linears(model, x)
    model.q(x)
    model.k(x).mul_(2)
    torch.testing.assert_close(model.k(x), expected)


def test_linears_that_are_tied_to_a_group_are_no_group():
    """Their Parameters would be moved out of that group, whose memory compiled code would go on reading."""
    first, second = quantized(bias=False), quantized(bias=False)
    for name in ("q", "k", "v", "gate", "up", "out"):
        getattr(second, name).weight = getattr(first, name).weight
    model, x = nn.Sequential(first, nn.Linear(96, WIDTH, device=DEVICE), second), tokens()
    fused = fuse_linears(model, x)
    assert fused.groups == [("0.q", "0.k", "0.v"), ("0.gate", "0.up")]
    assert fused.left == {("2.q", "2.k", "2.v"): "they are tied", ("2.gate", "2.up"): "they are tied"}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    first.up.weight.mul_(2)
    found = compiled(x)
    unfuse_linears(model)
    torch.testing.assert_close(found, model(x))


def test_an_error_in_the_call_changes_nothing(products):
    model, x = quantized(), tokens()
    expected = model(x)
    with pytest.raises(UnsupportedError):
        fuse_linears(model, torch.ones(1, WIDTH, dtype=torch.int64, device=DEVICE))
    products.clear()
    assert torch.equal(model(x), expected)
    assert products == APART


def test_other_threads_get_their_own_numbers():
    """The calls of two threads, one between two calls of the other."""
    model, x, y = quantized(), tokens(), tokens()
    expected = [[getattr(model, name)(t) for name in "qkv"] for t in (x, y)]
    fuse_linears(model, x)
    found = [[model.q(x)], [model.q(y)]]
    for name in "kv":
        for parts, t in zip(found, (x, y), strict=True):
            parts.append(getattr(model, name)(t))
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 4, MAX_TOKENS])
def test_bits_are_those_of_each_linear_where_one_kernel_computes_both(count):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 1024, bias=False)

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x)], dim=-1)

    model = load_and_quantize_model(
        Wide().to(torch.bfloat16), None, QuantizationConfig("nf4", skip_defaults=False), DEVICE
    )
    x = torch.randn(count, 4096, device=DEVICE, dtype=torch.bfloat16)
    expected = model(x)
    fuse_linears(model, x)
    for _ in range(3):  # the launcher, what is recorded, and a replay
        assert torch.equal(model(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 4])
def test_streams_and_graphs_take_no_part_of_another(count):
    model, x = quantized(), tokens(count)
    expected = [model.q(x), model.k(x), model.v(x)]
    fuse_linears(model, x)
    side = torch.cuda.Stream()
    for _ in range(3):
        model(x)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = model.q(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close([first, model.k(x), model.v(x)], expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [model.q(x), model.k(x), model.v(x)]
    eager = model.k(x)
    torch.zeros(1 << 16, dtype=torch.uint8, pin_memory=True)  # over what a launch might have left in host memory
    graph.replay()
    torch.testing.assert_close([*captured, eager], [*expected, expected[1]])
