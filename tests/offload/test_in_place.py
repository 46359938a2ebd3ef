"""InPlace: experts that a call reads in host memory. Outputs keep their bits, and only the rest is copied."""

import copy
import ctypes
import sys

import pytest
import torch
from torch import nn

import bigq
from bigq.offload import in_place
from bigq.offload.space import PinnedMap
from bigq.system.internals import SEES_EDITS
from offloaded_mixtral import FEW, LAYERS, MANY, ids_of, loaded, logits, nbytes_of


@pytest.mark.parametrize("weight_format", [bigq.NF4(), bigq.NF4(double_quant=True), bigq.FP4(block_size=32)], ids=repr)
@pytest.mark.parametrize("part", ["", ".mlp.experts"], ids=["layers", "experts"])
def test_outputs_are_those_of_the_resident_model(views_of_files, tmp_path, part, weight_format):
    resident = loaded(weight_format=weight_format)
    model = loaded(place="disk", part=part, weight_format=weight_format, folder=tmp_path)
    for tokens in (1, FEW, MANY, 2, 40, 1):
        assert torch.equal(logits(model, tokens), logits(resident, tokens)), tokens
    assert views_of_files


def test_a_call_of_few_tokens_copies_no_experts(views_of_files, copied, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    layer = model.model.layers[0]
    rest, whole = nbytes_of(layer, experts=False), nbytes_of(layer, experts=True)
    assert rest < whole / 4
    logits(model, 1)
    assert set(copied) == {rest}
    copied.clear()
    logits(model, FEW)
    assert set(copied) == {rest}
    copied.clear()
    logits(model, MANY)
    assert copied[0] == whole, "a copy without experts was there"
    assert set(copied) == {whole}


def test_a_call_after_a_prompt_takes_the_copy_that_is_there(views_of_files, copied, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    logits(model, MANY)
    logits(model, MANY)
    copied.clear()
    logits(model, 1)
    rest = nbytes_of(model.model.layers[0], experts=False)
    assert copied == [rest] * LAYERS, "layers 1 and 2, and layer 0 for the next call"


def test_blocks_that_stay_in_their_slots_are_copied_once(views_of_files, copied, tmp_path):
    model = loaded(place="disk", folder=tmp_path, layers=2)
    expected = logits(loaded(), 1)
    assert torch.equal(logits(model, 1), expected)
    assert set(copied) == {nbytes_of(model.model.layers[0], experts=True)}
    assert len(copied) == 2
    copied.clear()
    assert torch.equal(logits(model, 1), expected)
    assert not copied or not SEES_EDITS


def test_experts_alone_need_no_slot(views_of_files, copied, tmp_path):
    model = loaded(place="disk", part=".mlp.experts", folder=tmp_path)
    logits(model, 1)
    logits(model, 1)
    prefetcher = model.model.layers[0].mlp.experts._hf_hook.prefetcher
    assert set(copied) == {0}
    assert prefetcher._slots is None
    logits(model, MANY)
    assert len(prefetcher._slots) == 2


def test_the_modules_hold_their_own_tensors_between_calls(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    before = dict(model.named_parameters())
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits(model, 1)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    bigq.materialize(model)
    assert torch.equal(logits(model, 1), logits(loaded(), 1))


def test_a_call_reads_experts_in_the_views_and_nothing_else(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    layer = model.model.layers[1]
    held = {}

    def note(module, args):
        held.update({name: tensor.data_ptr() for name, tensor in layer.named_parameters()})

    own = {name: tensor.data_ptr() for name, tensor in layer.named_parameters()}
    layer.mlp.experts.register_forward_pre_hook(note)
    logits(model, 1)
    in_experts = {name for name in own if name.startswith("mlp.experts.")}
    assert {name for name in own if held[name] == own[name]} == in_experts


def test_edits_between_calls_are_seen(views_of_files, tmp_path):
    model, resident = loaded(place="disk", folder=tmp_path), loaded()
    logits(model, 1)
    for each in (model, resident):
        with torch.no_grad():
            each.model.layers[1].mlp.experts.down_proj_packed.bitwise_xor_(0x31)
            each.model.layers[2].mlp.experts.gate_up_proj = each.model.layers[0].mlp.experts.gate_up_proj.clone()
    assert torch.equal(logits(model, 1), logits(resident, 1))


def test_gradients_need_whole_copies(views_of_files, copied, tmp_path):
    model, resident = loaded(place="disk", folder=tmp_path), loaded()
    found = []
    for each in (model, resident):
        x = each.model.embed_tokens(ids_of(1)).requires_grad_()
        each(inputs_embeds=x, use_cache=False).logits.float().square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert nbytes_of(model.model.layers[0], experts=False) not in copied
    assert not views_of_files


@pytest.mark.parametrize("case", ["another implementation", "int8", "float32"])
def test_what_reads_all_experts_is_copied(views_of_files, copied, tmp_path, case):
    options = {"int8": {"weight_format": "int8"}, "float32": {"dtype": torch.float32}}.get(case, {})
    model, resident = loaded(place="disk", folder=tmp_path, **options), loaded(**options)
    if case == "another implementation":
        model.set_experts_implementation("eager")
        resident.set_experts_implementation("eager")
    assert torch.equal(logits(model, 1), logits(resident, 1))
    assert set(copied) == {nbytes_of(model.model.layers[0], experts=True)}


def test_experts_in_files_are_copied(copied, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    assert torch.equal(logits(model, 1), logits(loaded(), 1))
    assert set(copied) == {nbytes_of(model.model.layers[0], experts=True)}


def test_a_deepcopy_reads_its_own_experts(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    expected = logits(model, 1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj_packed.zero_()
    assert torch.equal(logits(other, 1), expected)


@pytest.fixture
def memory_of_gpu_0(monkeypatch):
    """torch on a machine with two GPUs, as far as `view_on` asks it; gives the bytes of each copy to the second one.

    torch takes the memory of an array for that of the GPU that was current when it was pinned, here the first.
    """
    mapping = PinnedMap(-1, 4096)
    mapping.gpu = 0
    copied = []

    def as_tensor(array, device):
        (nbytes,), (address, _) = (array.__cuda_array_interface__[key] for key in ("shape", "data"))
        memory = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
        memory.array = array
        if device.index == 0:
            return memory
        copied.append(nbytes)
        return memory.clone()

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(in_place, "mapping_of", lambda tensor: (mapping, 0))
    return copied


@pytest.mark.skipif(sys.platform != "linux", reason="views are made on Linux")
class TestViews:
    def test_a_view_has_the_memory_of_its_tensor(self, memory_of_gpu_0):
        own = nn.Parameter(torch.arange(6, dtype=torch.int32).view(2, 3), requires_grad=False)
        view = in_place.view_on(own, torch.device("cuda", 0))
        assert view.data_ptr() == own.data_ptr()
        assert torch.equal(view, own)
        assert isinstance(view, nn.Parameter)

    def test_another_gpu_than_that_of_the_memory_gets_no_copy_of_it(self, memory_of_gpu_0):
        assert in_place.view_on(torch.zeros(1000), torch.device("cuda", 1)) is None
        assert not memory_of_gpu_0

    def test_the_memory_lives_as_long_as_its_view(self):
        own = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        array = in_place._Bytes(own)
        own.data = torch.ones(4, dtype=torch.uint8)
        address, _ = array.__cuda_array_interface__["data"]
        assert array._tensor.data_ptr() == address


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("weight_format", [bigq.NF4(), bigq.NF4(double_quant=True)], ids=repr)
    @pytest.mark.parametrize("part", ["", ".mlp.experts"], ids=["layers", "experts"])
    def test_outputs_are_those_of_the_resident_model(self, part, weight_format):
        resident = loaded("cuda:0", weight_format=weight_format)
        model = loaded("cuda:0", "cpu", part, weight_format)
        for tokens in (1, 1, 1, FEW, MANY, 2, 40, 1):
            assert torch.equal(logits(model, tokens, "cuda"), logits(resident, tokens, "cuda")), tokens
        assert model.model.layers[0]._modules["mlp"].experts.gate_up_proj_packed.device.type == "cpu"

    def test_a_graph_reads_experts_on_the_host(self):
        model = loaded("cuda:0", "cpu", ".mlp.experts")
        ids = ids_of(1, "cuda")
        with torch.no_grad():
            model(ids, use_cache=False)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                model(ids, use_cache=False)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(ids, use_cache=False).logits
            for token in (3, 17, 42):  # which other experts see
                ids.fill_(token)
                graph.replay()
                assert torch.equal(out, model(ids, use_cache=False).logits)

    def test_memory_is_freed_after_the_device_has_read_it(self):
        model = loaded("cuda:0", "cpu", ".mlp.experts")
        expected = logits(model, 1, "cuda").clone()
        for _ in range(3):
            other = loaded("cuda:0", "cpu", ".mlp.experts")
            out = logits(other, 1, "cuda")
            del other
            assert torch.equal(out, expected)
