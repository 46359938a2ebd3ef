"""Each private name of torch has a public way that gives the same results, and is taken where torch has renamed it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.nn import functional as F

from bigq.system import internals
from renamed_internals import FILES, NAMES, ROOT, renamed

NAME = "bigq.system.internals"


def _twice():
    """A sparse tensor that holds 1 and 2 at one place."""
    return torch.sparse_coo_tensor(torch.tensor([[3, 3]]), torch.tensor([1.0, 2.0]), (5,), check_invariants=True)


def _leaves_fsdp_alone(module):
    """Whether FSDP2 has torch's Parameter after `module` was to change it, in a process that a launcher has started."""
    kept = _fsdp_param.FSDPParam.init_dtype_attrs
    with (
        mock.patch.object(_fsdp_param, "nn", nn),
        mock.patch.object(_fsdp_param.FSDPParam, "init_dtype_attrs", kept),
        mock.patch.dict(os.environ, WORLD_SIZE="2"),
    ):
        module.let_fsdp_shard_integers()
        return _fsdp_param.nn is nn


# What tells that a public way is taken, for each private name.
PUBLIC = {
    "DisableTorchFunctionSubclass": lambda module: module.as_plain_tensor is module._by_default,
    "NonDynamicallyQuantizableLinear": lambda module: True,  # the class is found on another way
    "_check": lambda module: module.check is module._check,
    "_EXTRA_STATE_KEY_SUFFIX": lambda module: module.EXTRA_STATE == "_extra_state",  # as it has been in all releases
    "_fsdp_param": _leaves_fsdp_alone,  # torch's own error says that it takes no integers
    "_grouped_mm": lambda module: True,  # what F.grouped_mm calls is found on another way
    "_make_wrapper_subclass": lambda module: module.wrapper is module._wrapper_of_freed,
    "_foreach_copy_": lambda module: module.copy_all is module._copy_one_by_one,
    "_has_any_global_hook": lambda module: not module.calls_only_forward(nn.Identity()),
    "_schema": lambda module: module.may_write(torch.ops.aten.add.Tensor),
    "_version": lambda module: not module.SEES_EDITS,
    "_current_graph_task_id": lambda module: module.is_in_backward() is None,
    **dict.fromkeys(("_is_view", "_unsafe_view"), lambda module: module.as_result is torch.clone),
    "unflatten_dense_tensors": lambda module: module.cut is module._cut_one_by_one,
    **dict.fromkeys(("_indices", "_values"), lambda module: len(module.sparse_parts(_twice())[1]) == 1),
    **dict.fromkeys(
        ("_storage_Use_Count", "_use_count", "_cdata"), lambda module: module.count_holders(torch.ones(1), []) is None
    ),
    **dict.fromkeys(
        ("_saved_tensors_hooks_is_enabled", "_top_saved_tensors_default_hooks"),
        lambda module: not module.can_hook_saved_tensors(),
    ),
    **dict.fromkeys(
        (
            "_current_level",
            "_functorch",
            "_get_tracing_state",
            "_len_torch_dispatch_stack",
            "_len_torch_function_stack",
            "_profiler_enabled",
        ),
        lambda module: module.something_listens(),
    ),
}
FOUND_OTHERWISE = ["NonDynamicallyQuantizableLinear", "_EXTRA_STATE_KEY_SUFFIX", "_grouped_mm"]


@pytest.fixture(params=[(), NAMES[NAME]], ids=["as-it-is", "all-renamed"], scope="module")
def module(request):
    return renamed(NAME, *request.param)


@pytest.mark.skipif(internals.__spec__ is None, reason="all are renamed: tests/support/renamed_internals.py")
def test_this_torch_has_all_that_is_private():
    assert [name for name, is_public in PUBLIC.items() if is_public(internals)] == FOUND_OTHERWISE


@pytest.mark.parametrize("name", NAMES[NAME])
def test_a_renamed_one_is_done_without(name):
    assert PUBLIC[name](renamed(NAME, name))


class _Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_listener_is_never_missed(module):
    with _Functions():
        assert module.something_listens()


def test_an_edit_is_never_missed(module):
    tensor = torch.zeros(2)
    before = module.version_of(tensor), module.edits_of(tensor)
    assert not module.SEES_EDITS or before == (module.version_of(tensor), module.edits_of(tensor))
    tensor.view(1, 2).add_(1)
    assert before[0] != module.version_of(tensor)
    assert before[1] != module.edits_of(tensor)


def test_of_a_tensor_made_in_inference_mode_no_edits_are_counted(module):
    with torch.inference_mode():
        assert module.version_of(torch.zeros(2).add_(1)) == 0


HOLDERS = {
    "view": lambda buffer, lent: buffer[:1],
    "name": lambda buffer, lent: lent,
    "closure": lambda buffer, lent: lambda: lent,
    "graph": lambda buffer, lent: lent * torch.ones(2, requires_grad=True),
    "storage": lambda buffer, lent: lent.untyped_storage(),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_a_holder_is_never_missed(module, hold):
    buffer = torch.zeros(2)
    lent = [nn.Parameter(buffer.view(2), requires_grad=False)]
    alone = module.count_holders(buffer, lent)
    assert module.count_holders(buffer, lent) == alone
    held = hold(buffer, lent[0])
    assert alone is None or hold is HOLDERS["storage"] or module.count_holders(buffer, lent) != alone
    del held
    assert module.count_holders(buffer, lent) == alone


def test_hooks_in_force_are_told_or_none_are_set(module):
    def unchanged(tensor):
        return tensor

    if module.can_hook_saved_tensors():
        assert module.saved_tensor_hooks() is None
        with saved_tensors_hooks(unchanged, unchanged):
            assert module.saved_tensor_hooks() == (unchanged, unchanged)
    with disable_saved_tensors_hooks("not here"):
        assert not module.can_hook_saved_tensors()


@pytest.mark.parametrize("shapes", [[(2, 3), (), (0, 4), (5,)], [(12,)], []], ids=str)
def test_cuts_memory_into_views(module, shapes):
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    flat = torch.arange(numel, dtype=torch.int16)
    views = module.cut(flat, shapes)
    assert [tuple(view.shape) for view in views] == shapes
    assert [value for view in views for value in view.flatten().tolist()] == list(range(numel))
    assert {view.untyped_storage().data_ptr() for view in views if view.numel()} <= {flat.data_ptr()}


class _Hears(torch.Tensor):
    """A subclass as QuantizedWeight is one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return cls.module.as_plain_tensor(super().__torch_function__, func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(func)
        return torch.tensor(7.0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("strides", [None, (1, 2)], ids=["contiguous", "transposed"])
def test_a_wrapper_has_looks_and_no_memory(module, device, strides):
    _Hears.module, _Hears.heard = module, []
    made = module.wrapper(_Hears, (2, 2), strides, torch.bfloat16, torch.device(device))
    looks = type(made), made.shape, made.stride(), made.dtype, made.device.type, made.requires_grad
    assert looks == (_Hears, (2, 2), strides or (2, 1), torch.bfloat16, device, False)
    assert _Hears.heard == []
    torch.mm(made, made)
    assert _Hears.heard[:1] == [torch.ops.aten.mm.default]  # what reaches torch's C++ comes back to the class


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_wrapper_of_a_large_weight_costs_no_memory(module):
    def resident_nbytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    _Hears.module, _Hears.heard = module, []
    before = resident_nbytes()
    made = [module.wrapper(_Hears, (1 << 14, 1 << 12), None, torch.float32, torch.device("cpu")) for _ in range(4)]
    assert len(made) == 4
    assert resident_nbytes() - before < 64 << 20  # of 1 GiB


def test_an_op_that_writes_is_never_missed(module):
    aten = torch.ops.aten
    assert all(map(module.may_write, (aten.add_.Tensor, aten.add.out, aten.copy_.default, aten.fill_.Scalar)))


def test_a_failed_check_raises_what_it_says(module):
    module.check(True, lambda: "right")
    with pytest.raises(RuntimeError, match="these do not fit"):
        module.check(False, lambda: "these do not fit")


def test_finds_the_linear_of_an_attention(module):
    assert module.ATTENTION_OUTPUT is type(nn.MultiheadAttention(2, 1).out_proj)
    assert module.ATTENTION_OUTPUT is not nn.Linear


class _Notes(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_knows_what_a_subclass_hears_of_a_grouped_product(module):
    x, weight = torch.randn(3, 8).as_subclass(_Notes), torch.randn(2, 8, 4)
    stops = torch.tensor([1, 3], dtype=torch.int32)
    for product in (F.grouped_mm, torch._grouped_mm):
        _Notes.heard = []
        product(x, weight, offs=stops)
        assert _Notes.heard[0] in module.GROUPED_PRODUCTS
    assert {product.__name__.strip("_") for product in module.GROUPED_PRODUCTS} == {"grouped_mm"}


def test_sparse_parts_make_the_tensor(module):
    indices, values = module.sparse_parts(_twice())
    made = torch.sparse_coo_tensor(indices, values, (5,), check_invariants=True)
    assert made.to_dense().tolist() == [0, 0, 0, 3, 0]


def test_finds_the_hooks_of_a_module(module):
    def hook(*args):
        raise AssertionError("nothing is called")

    asks = {
        "register_load_state_dict_pre_hook": module.load_hooks,
        "register_state_dict_pre_hook": lambda of: module.state_hooks(of)[0],
        "register_state_dict_post_hook": lambda of: module.state_hooks(of)[1],
        "register_forward_pre_hook": module.has_forward_pre_hooks,
    }
    for method in asks:
        hooked = nn.Linear(2, 2)
        assert not any(ask(hooked) for ask in asks.values())
        handle = getattr(hooked, method)(hook)
        assert [name for name, ask in asks.items() if ask(hooked)] == [method]
        handle.remove()
        assert not any(ask(hooked) for ask in asks.values())


CALL_HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")


@pytest.mark.parametrize("hook", CALL_HOOKS)
def test_a_module_with_a_hook_calls_more_than_its_forward(hook):
    modules = nn.Linear(2, 2), nn.Linear(2, 2)
    is_told = internals.calls_only_forward(*modules)
    assert is_told is internals.TELLS_LISTENERS
    handle = getattr(modules[1], f"register_{hook}")(lambda *args: None)
    assert internals.calls_only_forward(modules[0]) is is_told
    assert not internals.calls_only_forward(*modules)
    handle.remove()
    assert internals.calls_only_forward(*modules) is is_told
    handle = getattr(nn.modules.module, f"register_module_{hook}")(lambda *args: None)
    assert not internals.calls_only_forward(modules[0])
    handle.remove()


def test_a_forward_of_a_module_s_own_is_no_call_of_its_class():
    module = nn.Linear(2, 2)
    module.forward = module.forward
    assert not internals.calls_only_forward(module)


@pytest.mark.parametrize("name", NAMES)
def test_the_list_of_private_names_is_whole(name):
    """All that are renamed together: underscored attributes and words, but for what the file defines itself."""
    tree = ast.parse(FILES[name].read_text())
    own, used = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word) | ast.Name(id=word, ctx=ast.Store()):
                own.add(word)
            case ast.Attribute(attr=word) | ast.alias(name=word):
                used.add(word)
            case ast.Constant(value=str(text)):
                used |= set(re.findall(r"\w+", text)) if re.fullmatch(r"[\w.]+", text) else set()
    private = {word for word in used - own if re.match("_(?!_)", word)}
    folders = {"_C", "_autograd", "_fully_shard", "_nn"}  # each name in them is in the list
    of_python = {"_is_gil_enabled"}
    assert private - folders - of_python - {"_extra_state"} <= set(NAMES[name])  # the last is part of the file format


@pytest.mark.slow
def test_the_suite_passes_with_all_of_them_renamed():
    """The files that ask most of them, in 25 s of CPU time; docs/design.md says how to run all of it."""
    files = (
        "kernels/test_internals.py",
        "loading/test_destinations.py",
        "loading/test_runs.py",
        "model/test_own_names.py",
        "offload/test_dispatch.py",
        "offload/test_materialize.py",
        "offload/test_prefetch.py",
        "offload/test_prefetch_gradients.py",
        "offload/test_state_guard.py",
        "ops/test_eager.py",
        "system/test_internals.py",
        "weight/test_lazy_weight.py",
        "weight/test_stored.py",
        "weight/test_weight_views.py",
    )
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "triton_kernels", "tests/support"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "renamed_internals"]
    done = subprocess.run(
        [*command, *(str(Path("tests") / file) for file in files)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(internals.__spec__ is None, reason="renamed")
def test_fsdp2_of_an_older_torch_makes_parameters_of_integers(monkeypatch):
    monkeypatch.setattr(_fsdp_param, "nn", nn)
    monkeypatch.setattr(_fsdp_param.FSDPParam, "init_dtype_attrs", _fsdp_param.FSDPParam.init_dtype_attrs)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    internals.let_fsdp_shard_integers()
    assert _fsdp_param.nn is nn, "a single process does not import FSDP2"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(2):
        internals.let_fsdp_shard_integers()
    made = [_fsdp_param.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.uint8, torch.float32)]
    assert [type(parameter) for parameter in made] == [nn.Parameter, nn.Parameter]
    assert [parameter.requires_grad for parameter in made] == [False, True]
    assert not _fsdp_param.nn.Parameter(torch.ones(2), requires_grad=False).requires_grad
    assert _fsdp_param.nn.Module is nn.Module

    def casts(param, policy):  # what torch 2.11 does
        param.param_dtype = policy.param_dtype

    init = internals._leaving_integers(casts)
    for dtype, expected in ((torch.uint8, None), (torch.float32, torch.bfloat16)):
        param = SimpleNamespace(sharded_param=torch.ones(2, dtype=dtype))
        init(param, SimpleNamespace(param_dtype=torch.bfloat16))
        assert param.param_dtype is expected
