"""cache_experts: outputs keep their bits, and experts that were hit lately are not read in host memory again."""

import threading

import pytest
import torch

import bigq
from bigq.ops import eager
from bigq.system.internals import SEES_EDITS
from offloaded_mixtral import (
    FEW,
    LAYERS,
    MANY,
    NESTED,
    ROOM,
    TOP_K,
    E,
    experts_of,
    gpt_oss,
    ids_of,
    loaded,
    logits,
    logits_of,
    room_for,
)

pytestmark = pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen, so there is no cache")
FORMATS = [bigq.NF4(), bigq.FP4(block_size=32)]


@pytest.mark.parametrize("slots", [TOP_K, 2 * TOP_K, 7, E])
@pytest.mark.parametrize("part", ["", ".mlp.experts"], ids=["layers", "experts"])
@pytest.mark.parametrize(
    "options",
    [*({"weight_format": each} for each in FORMATS), NESTED, {"build": gpt_oss}],
    ids=["nf4", "fp4", "nested", "biases"],
)
def test_outputs_are_those_of_the_resident_model(views_of_files, made, tmp_path, options, part, slots):
    resident, model = loaded(**options), loaded(place="disk", part=part, folder=tmp_path, **options)
    assert bigq.cache_experts(model, room_for(model, slots)) == {
        f"model.layers.{i}.mlp.experts": slots for i in range(LAYERS)
    }
    calls = 12
    for _ in range(calls):
        ids = torch.randint(0, 64, (1, 1))
        assert torch.equal(logits_of(model, ids), logits_of(resident, ids))
    assert len(made) == calls * LAYERS
    assert 0 < sum(made) < calls * LAYERS * TOP_K, "some were hit, and some were not"
    for tokens in (2, FEW, MANY, 1, 40, 2, 1):
        assert torch.equal(logits(model, tokens), logits(resident, tokens)), tokens


def test_a_call_copies_what_the_calls_before_it_did_not_hit(views_of_files, made, tmp_path):
    model = loaded(place="disk", part=".mlp.experts", folder=tmp_path)
    bigq.cache_experts(model, ROOM)
    hit = [set() for _ in range(LAYERS)]
    for layer in range(LAYERS):
        experts = experts_of(model, layer)

        def note(module, args, hit=hit[layer]):
            hit.update(args[1].flatten().tolist())

        experts.register_forward_pre_hook(note)
    for token in (3, 3, 17, 42, 3):
        before = sum(map(len, hit))
        made.clear()
        logits_of(model, torch.tensor([[token]]))
        assert sum(made) == sum(map(len, hit)) - before
    assert sum(map(len, hit)) > LAYERS * TOP_K


@pytest.mark.parametrize(
    "tokens, slots, uses",
    [(1, TOP_K, True), (2, 2 * TOP_K, True), (2, 2 * TOP_K - 1, False), (FEW, E, False), (MANY, E, False)],
    ids=["one", "as-many-rows-as-slots", "more-rows-than-slots", "sorted-rows", "whole-copies"],
)
def test_which_calls_use_the_cache(views_of_files, made, tmp_path, tokens, slots, uses):
    model = loaded(place="disk", folder=tmp_path)
    bigq.cache_experts(model, room_for(model, slots))
    assert torch.equal(logits(model, tokens), logits(loaded(), tokens))
    assert bool(made) is uses


def test_products_with_gradients_do_without(views_of_files, made, tmp_path):
    """A backward pass would find other experts in the slots."""
    model, resident = loaded(place="disk", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    x = torch.randn(1, 64).bfloat16()
    route = torch.tensor([[3, 5]]), torch.tensor([[0.5, 0.5]]).bfloat16()
    found = []

    def inside(module, args):
        with torch.enable_grad():
            found.append(module.forward(x, *route))

    experts_of(model).register_forward_pre_hook(inside)
    logits(model, 1)
    assert torch.equal(found[0], experts_of(resident)(x, *route))
    assert len(made) == LAYERS


def test_compiled_code_does_without(views_of_files, made, tmp_path):
    model, resident = loaded(place="disk", part=".mlp.experts", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    experts = experts_of(model)
    x = torch.randn(1, 64).bfloat16()
    route = torch.tensor([[3, 5]]), torch.tensor([[0.5, 0.5]]).bfloat16()
    torch._dynamo.reset()
    experts.compile(backend="eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(experts(x, *route), experts_of(resident)(x, *route))
    assert not made


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_does_without(views_of_files, made, tmp_path):
    model, resident = loaded(place="disk", part=".mlp.experts", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    x, weights = torch.randn(3, 1, 64).bfloat16(), torch.rand(3, 1, TOP_K).bfloat16()
    ids = torch.tensor([[[3, 5]], [[1, 2]], [[3, 4]]])
    with torch.no_grad():
        found, expected = (torch.func.vmap(experts_of(each))(x, ids, weights) for each in (model, resident))
    assert torch.equal(found, expected)
    assert not made


def listened():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.mark.parametrize("context", [torch.inference_mode, listened])
def test_inference_mode_and_a_profiler_change_nothing(views_of_files, made, tmp_path, context):
    model, resident = loaded(place="disk", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    for token in (3, 17, 3):
        ids = torch.tensor([[token]])
        with context():
            got = logits_of(model, ids)
        assert torch.equal(got, logits_of(resident, ids))
        assert torch.equal(logits_of(model, ids), got)
    assert made[-LAYERS:] == [0] * LAYERS


def test_experts_that_do_not_exist_add_nothing(views_of_files, made, tmp_path):
    model, resident = loaded(place="disk", part=".mlp.experts", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    x, weights = torch.randn(2, 64).bfloat16(), torch.rand(2, TOP_K).bfloat16()
    with torch.no_grad():
        for ids in ([[3, E], [-1, 7]], [[3, 3], [7, 3]], [[E, E], [-1, -1]]):
            route = torch.tensor(ids), weights
            assert torch.equal(experts_of(model)(x, *route), experts_of(resident)(x, *route))
    assert made == [2, 0, 0]


@pytest.mark.parametrize("options", [{}, NESTED, {"build": gpt_oss}], ids=["nf4", "nested", "biases"])
def test_edits_between_calls_are_seen(views_of_files, made, tmp_path, options):
    model, resident = loaded(place="disk", folder=tmp_path, **options), loaded(**options)
    bigq.cache_experts(model, ROOM)
    logits(model, 1)
    for each in (model, resident):
        with torch.no_grad():
            experts_of(each, 1).down_proj_packed.bitwise_xor_(0x31)
            experts_of(each, 2).gate_up_proj = experts_of(each, 0).gate_up_proj.clone()
            if "nested_offset" in str(list(experts_of(each).state_spec())):
                experts_of(each, 0).down_proj_nested_offset.view(torch.float32).mul_(1.5)
            if hasattr(experts_of(each), "down_proj_bias"):
                experts_of(each, 0).down_proj_bias.mul_(-2)
    made.clear()
    assert torch.equal(logits(model, 1), logits(resident, 1))
    assert made[1:] == [TOP_K, TOP_K]
    made.clear()
    assert torch.equal(logits(model, 1), logits(resident, 1))
    assert made == [0] * LAYERS


@pytest.mark.parametrize("step", ["assign_slots", "fill_slots"])
def test_a_call_that_was_interrupted_leaves_nothing_wrong(views_of_files, monkeypatch, tmp_path, step):
    model, resident = loaded(place="disk", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    logits(model, 1)
    call_op, interrupted = eager.call_op, []

    def interrupt(name, *args):
        if name == step:
            if step == "assign_slots":
                call_op(name, *args)  # the slots say what they do not hold
            interrupted.append(name)
            raise KeyboardInterrupt
        return call_op(name, *args)

    ids = torch.tensor([[33]])
    monkeypatch.setattr(eager, "call_op", interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:  # its traceback keeps all frames
        logits_of(model, ids)
    monkeypatch.setattr(eager, "call_op", call_op)
    assert interrupted == [step]
    assert torch.equal(logits_of(model, ids), logits_of(resident, ids))
    cache = experts_of(model).expert_cache
    assert kept.value is not None
    assert cache._is_whole, "the next call used it"


def test_a_call_beside_one_that_uses_the_slots_does_without(views_of_files, made, tmp_path):
    model, resident = loaded(place="disk", part=".mlp.experts", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    experts, found = experts_of(model), []
    x = torch.randn(1, 64).bfloat16()
    routes = [(torch.tensor([[a, b]]), torch.ones(1, 2).bfloat16()) for a, b in ((3, 5), (8, 1))]
    activated = type(experts)._activated

    def call_from_another_thread(module, y):
        if module is experts and not found:
            found.append(None)
            thread = threading.Thread(target=lambda: found.append(call(routes[1])))
            thread.start()
            thread.join()
        return activated(module, y)

    def call(route):
        with torch.no_grad():
            return experts(x, *route)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(experts), "_activated", call_from_another_thread)
        outer = call(routes[0])
    assert made == [2], "the call of the other thread reads host memory"
    with torch.no_grad():
        assert torch.equal(outer, experts_of(resident)(x, *routes[0]))
        assert torch.equal(found[1], experts_of(resident)(x, *routes[1]))
    call(routes[1])
    assert made == [2, 2]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of transformers, by PEFT
def test_adapters_of_experts_get_the_ids_of_experts(views_of_files, made, tmp_path):
    peft = pytest.importorskip("peft")
    outputs = []
    for place in (None, "disk"):
        model = loaded(place=place, part=".mlp.experts", folder=tmp_path)
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
        lora.init_lora_weights = False
        adapted = peft.get_peft_model(model, lora).eval()
        if place is not None:
            bigq.cache_experts(adapted, ROOM)
        outputs.append([logits_of(adapted, torch.tensor([[token]])) for token in (3, 17, 3)])
    assert all(map(torch.equal, *outputs))
    assert 0 in made


def test_an_implementation_that_is_changed_later_does_without(views_of_files, made, tmp_path):
    model, resident = loaded(place="disk", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    for each in (model, resident):
        each.set_experts_implementation("eager")
    assert torch.equal(logits(model, 1), logits(resident, 1))
    assert not made


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("slots", [TOP_K, 7])
    @pytest.mark.parametrize("part", ["", ".mlp.experts"], ids=["layers", "experts"])
    @pytest.mark.parametrize("options", [{}, NESTED, {"build": gpt_oss}], ids=["nf4", "nested", "biases"])
    def test_outputs_are_those_of_host_memory_and_of_the_resident_model(self, options, part, slots):
        models = loaded("cuda:0", **options), *(loaded("cuda:0", "cpu", part, **options) for _ in range(2))
        bigq.cache_experts(models[2], room_for(models[2], slots))
        for step in range(40):
            ids = torch.randint(0, 64, (1, 1 if step % 5 else 2))
            resident, direct, cached = (logits_of(model, ids, "cuda") for model in models)
            assert torch.equal(resident, cached), step
            assert torch.equal(direct, cached), step
        for tokens in (FEW, MANY, 1, 40, 2, 1):
            assert torch.equal(logits(models[2], tokens, "cuda"), logits(models[0], tokens, "cuda")), tokens

    def test_a_graph_and_calls_between_its_replays_share_the_cache(self):
        model, resident = loaded("cuda:0", "cpu", ".mlp.experts"), loaded("cuda:0")
        bigq.cache_experts(model, room_for(model, 4))
        ids = ids_of(1, "cuda")
        with torch.no_grad():
            stream = torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                model(ids, use_cache=False)
                model(ids, use_cache=False)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(ids, use_cache=False).logits
            for step in range(30):
                ids.fill_(int(torch.randint(0, 64, ())))
                graph.replay()
                expected = resident(ids, use_cache=False).logits
                assert torch.equal(out, expected), step
                if step % 7 == 0:
                    assert torch.equal(model(ids, use_cache=False).logits, expected)

    def test_edits_are_seen_and_a_graph_sees_them_after_a_call(self):
        model, resident = loaded("cuda:0", "cpu", ".mlp.experts"), loaded("cuda:0")
        bigq.cache_experts(model, ROOM)
        ids = ids_of(1, "cuda")
        with torch.no_grad():
            model(ids, use_cache=False)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(ids, use_cache=False).logits
            graph.replay()
            torch.cuda.synchronize()
            for each in (model, resident):
                experts_of(each, 1).down_proj_packed.bitwise_xor_(0x31)
            other = torch.cuda.CUDAGraph()
            with pytest.raises(bigq.UnsupportedError, match="before they were"), torch.cuda.graph(other):
                model(ids, use_cache=False)
            expected = resident(ids, use_cache=False).logits
            assert torch.equal(model(ids, use_cache=False).logits, expected)
            graph.replay()
            assert torch.equal(out, expected)

    def test_calls_on_several_streams_wait_for_each_other(self):
        model, resident = loaded("cuda:0", "cpu", ".mlp.experts"), loaded("cuda:0")
        bigq.cache_experts(model, room_for(model, TOP_K))
        streams = [torch.cuda.Stream() for _ in range(3)]
        tokens = torch.randint(0, 64, (60,)).tolist()
        expected = [logits_of(resident, torch.tensor([[token]]), "cuda") for token in tokens]
        torch.cuda.synchronize()
        outputs = []
        for step, token in enumerate(tokens):
            with torch.cuda.stream(streams[step % 3]):
                outputs.append(logits_of(model, torch.tensor([[token]]), "cuda"))
        torch.cuda.synchronize()
        assert all(map(torch.equal, outputs, expected))
