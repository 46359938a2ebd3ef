"""cache_experts: outputs keep their bits, and experts that were hit lately are not read in host memory again."""

import copy
import pickle
import sys
import threading
from functools import partial

import pytest
import torch

import bigq
from bigq.ops import eager
from bigq.system.internals import SEES_EDITS
from offloaded_mixtral import FEW, LAYERS, MANY, TOP_K, E, gpt_oss, ids_of, loaded, logits, mixtral, nbytes_of

pytestmark = pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen, so there is no cache")
ROOM = 1 << 20  # for all experts
FORMATS = [bigq.NF4(), bigq.FP4(block_size=32)]
nested_mixtral = partial(mixtral, width=128, inner=128)  # whose experts have whole blocks of 256 scales
NESTED = {"weight_format": bigq.NF4(double_quant=True), "build": nested_mixtral}


def experts_of(model, layer=0):
    return model.model.layers[layer].mlp.experts


def room_for(model, slots):
    """Bytes of a cache of `slots` experts of each layer."""
    experts = experts_of(model)
    cache = bigq.weight.expert_cache.ExpertCache
    return LAYERS * cache.nbytes_of(experts.cached_specs(slots)[0], slots)


def logits_of(model, ids, device="cpu"):
    with torch.no_grad():
        return model(ids.to(device), use_cache=False).logits


@pytest.fixture
def made(monkeypatch):
    """The number of experts that each call of a layer with a cache copied."""
    counts = []
    call_op = eager.call_op

    def counted(name, *args):
        if name == "fill_slots":
            counts.append(int((args[0][:, 0] >= 0).sum()))
        return call_op(name, *args)

    monkeypatch.setattr(eager, "call_op", counted)
    return counts


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


def test_the_memory_is_within_max_bytes_and_counted(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    before = bigq.memory_footprint(model).nbytes
    limit = room_for(model, 5) + 1000
    assert set(bigq.cache_experts(model, limit).values()) == {5}
    caches = [experts_of(model, i).expert_cache for i in range(LAYERS)]
    assert sum(cache.nbytes for cache in caches) <= limit
    after = bigq.memory_footprint(model).nbytes
    experts = experts_of(model)
    for kind, names in {"packed": ["packed"], "scales": ["absmax"]}.items():
        nbytes = sum(
            LAYERS * 5 * experts._parameters[f"{leaf}_{name}"][0].nbytes
            for leaf in ("gate_up_proj", "down_proj")
            for name in names
        )
        assert after["cpu"][kind] - before["cpu"][kind] == nbytes
    assert after["disk"] == before["disk"]
    assert bigq.cache_experts(model, 0) == {}
    assert bigq.memory_footprint(model).nbytes == before
    assert experts.expert_cache is None


def test_max_bytes_may_be_a_string_and_is_divided_evenly(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    assert set(bigq.cache_experts(model, "1MB").values()) == {E}
    assert set(bigq.cache_experts(model, room_for(model, 4)).values()) == {4}
    assert set(bigq.cache_experts(model, room_for(model, 4) - 1).values()) == {3}


def test_what_takes_the_hooks_away_takes_the_cache_away(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    bigq.cache_experts(model, ROOM)
    expected = logits(model, 1)
    bigq.materialize(model)
    assert experts_of(model).expert_cache is None
    assert bigq.cache_experts(model, 0) == {}
    assert torch.equal(logits(model, 1), expected)


@pytest.mark.parametrize("way", [bigq.materialize, lambda model: bigq.cache_experts(model, 0)], ids=["hooks", "0"])
def test_a_cache_that_was_taken_away_leaves_no_attribute(views_of_files, tmp_path, way):
    """`dequantize` gives the experts their own class again, whose attributes are those of transformers."""
    model = loaded(place="disk", folder=tmp_path)
    bigq.cache_experts(model, ROOM)
    way(model)
    bigq.dequantize(model)
    assert "expert_cache" not in vars(experts_of(model))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_model_has_no_cache(views_of_files, made, tmp_path, way):
    model = loaded(place="disk", folder=tmp_path)
    bigq.cache_experts(model, ROOM)
    expected = logits(model, 1)
    other = way(model)
    assert experts_of(other).expert_cache is None
    assert experts_of(model).expert_cache is not None
    made.clear()
    assert torch.equal(logits(other, 1), expected)
    assert not made
    bigq.cache_experts(other, ROOM)
    assert torch.equal(logits(other, 1), expected)
    assert made == [TOP_K] * LAYERS


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


@pytest.mark.parametrize("max_bytes", ["a lot", -1, 1.5, None], ids=repr)
def test_what_is_no_number_of_bytes_is_refused(views_of_files, tmp_path, max_bytes):
    with pytest.raises(bigq.ConfigError, match=r"max_bytes is .*expected bytes, or a string such as '4GiB'"):
        bigq.cache_experts(loaded(place="disk", folder=tmp_path), max_bytes)


def test_less_than_one_token_needs_is_refused_with_what_it_needs(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    bigq.cache_experts(model, ROOM)
    cache, needed = experts_of(model).expert_cache, room_for(model, TOP_K)
    with pytest.raises(bigq.PlacementError, match=rf"for 3 layers with experts; expected {needed:,} bytes or more"):
        bigq.cache_experts(model, needed - 1)
    assert experts_of(model).expert_cache is cache
    assert set(bigq.cache_experts(model, needed).values()) == {TOP_K}


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "MixtralForCausalLM has no offloaded experts"),
        ({"place": "disk", "weight_format": "int8"}, r"gate_up_proj in Int8.* is not read in host memory"),
        ({"place": "disk", "dtype": torch.float32}, r"gate_up_proj in NF4.* and torch\.float32 is not read"),
        ({"place": "disk", "weight_format": bigq.NF4(double_quant=True)}, "two experts of gate_up_proj share second-"),
    ],
    ids=["resident", "int8", "float32", "nested"],
)
def test_experts_that_cannot_be_cached_are_refused_with_the_reason(views_of_files, tmp_path, options, message):
    model = loaded(folder=tmp_path, **options)
    with pytest.raises(bigq.UnsupportedError, match=message):
        bigq.cache_experts(model, ROOM)
    assert bigq.cache_experts(model, 0) == {}


def test_without_versions_of_tensors_there_is_no_cache(views_of_files, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["bigq.offload.cache_experts"], "SEES_EDITS", False)
    model = loaded(place="disk", folder=tmp_path)
    with pytest.raises(bigq.UnsupportedError, match="does not tell which experts were edited"):
        bigq.cache_experts(model, ROOM)


def test_experts_that_other_code_computes_are_refused(views_of_files, tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    model.set_experts_implementation("eager")
    with pytest.raises(bigq.UnsupportedError, match=r"layers\.0\.mlp\.experts: they are not computed by bigq's"):
        bigq.cache_experts(model, ROOM)


def test_experts_in_files_are_refused(tmp_path):
    model = loaded(place="disk", folder=tmp_path)
    with pytest.raises(bigq.UnsupportedError, match='all offloaded experts of MixtralForCausalLM are stored on "disk"'):
        bigq.cache_experts(model, ROOM)


def test_an_implementation_that_is_changed_later_does_without(views_of_files, made, tmp_path):
    model, resident = loaded(place="disk", folder=tmp_path), loaded()
    bigq.cache_experts(model, ROOM)
    for each in (model, resident):
        each.set_experts_implementation("eager")
    assert torch.equal(logits(model, 1), logits(resident, 1))
    assert not made


def test_a_change_in_a_call_is_refused(views_of_files, tmp_path):
    model = loaded(place="disk", part=".mlp.experts", folder=tmp_path)
    found = []

    def change(module, args):
        with pytest.raises(bigq.PlacementError, match=r"layers\.1\.mlp\.experts is called now"):
            bigq.cache_experts(model, ROOM)
        found.append(True)

    experts = experts_of(model, 1)
    gate = type(experts)._activated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(experts), "_activated", lambda m, y: (m is experts and change(m, y), gate(m, y))[1])
        logits(model, 1)
    assert found


def test_stored_tensors_are_as_large_as_before(views_of_files, copied, tmp_path):
    """Nothing else is copied because of the cache."""
    model = loaded(place="disk", folder=tmp_path)
    bigq.cache_experts(model, ROOM)
    logits(model, 1)
    assert set(copied) == {nbytes_of(model.model.layers[0], experts=False)}


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

    def test_the_memory_of_the_gpu_is_taken_and_given_back(self):
        model = loaded("cuda:0", "cpu", ".mlp.experts")
        before = torch.cuda.memory_allocated()
        bigq.cache_experts(model, room_for(model, 8))
        caches = [experts_of(model, i).expert_cache.nbytes for i in range(LAYERS)]
        assert sum(caches) <= torch.cuda.memory_allocated() - before <= sum(caches) + LAYERS * 512
        del caches
        bigq.cache_experts(model, 0)
        assert torch.cuda.memory_allocated() == before
