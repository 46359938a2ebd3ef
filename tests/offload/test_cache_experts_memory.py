"""cache_experts: its memory is within max_bytes and counted, taken away with the hooks, and refused with the reason."""

import copy
import pickle
import sys

import pytest
import torch

import bigq
from bigq.system.internals import SEES_EDITS
from offloaded_mixtral import LAYERS, ROOM, TOP_K, E, experts_of, loaded, logits, nbytes_of, room_for

pytestmark = pytest.mark.skipif(not SEES_EDITS, reason="edits are not seen, so there is no cache")


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


def test_stored_tensors_are_as_large_as_before(views_of_files, copied, tmp_path):
    """Nothing else is copied because of the cache."""
    model = loaded(place="disk", folder=tmp_path)
    bigq.cache_experts(model, ROOM)
    logits(model, 1)
    assert set(copied) == {nbytes_of(model.model.layers[0], experts=False)}


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


@pytest.mark.gpu
def test_the_memory_of_the_gpu_is_taken_and_given_back():
    model = loaded("cuda:0", "cpu", ".mlp.experts")
    before = torch.cuda.memory_allocated()
    bigq.cache_experts(model, room_for(model, 8))
    caches = [experts_of(model, i).expert_cache.nbytes for i in range(LAYERS)]
    assert sum(caches) <= torch.cuda.memory_allocated() - before <= sum(caches) + LAYERS * 512
    del caches
    bigq.cache_experts(model, 0)
    assert torch.cuda.memory_allocated() == before
