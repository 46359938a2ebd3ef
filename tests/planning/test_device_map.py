"""Device maps as pure functions: normalizing, covering, filling."""

import pytest
import torch

from bigq import PlacementError, QuantizationConfig, infer_device_map, load_and_quantize_model, memory_footprint
from bigq.planning.device_map import (
    as_user_map,
    check_device_map,
    execution_device,
    is_offloaded,
    normalize_device_map,
    place_of,
)
from bigq.planning.infer_places import Node, Sized, balanced_budgets, infer_places, onload_nbytes


def leaf(name, nbytes, key=None):
    weight = Sized(f"{name}.weight", key or name, nbytes, nbytes)
    return Node(name=name, tensors=(weight,), children=(), is_atomic=False)


def block(name, nbytes):
    parts = (leaf(f"{name}.a", nbytes // 2), leaf(f"{name}.b", nbytes - nbytes // 2))
    return Node(name=name, tensors=(), children=parts, is_atomic=True)


def model(blocks=4, nbytes=100, embed=50, tied=False):
    layers = tuple(block(f"layers.{i}", nbytes) for i in range(blocks))
    body = Node(name="layers", tensors=(), children=layers, is_atomic=False, is_called=False)
    head = leaf("head", embed, key="embed" if tied else None)
    return Node(
        name="", tensors=(Sized("gain", "gain", 2, 2),), children=(leaf("embed", embed), body, head), is_atomic=False
    )


def test_cpu_values():
    assert normalize_device_map({"a": "cpu", "b": torch.device("cpu"), "c": "disk"}) == {
        "a": "cpu",
        "b": "cpu",
        "c": "disk",
    }


@pytest.mark.parametrize("value", ["gpu", "meta", torch.device("meta"), None, 1.5], ids=str)
def test_values_that_are_no_place(value):
    with pytest.raises(PlacementError, match=r"device_map\['layers'\]"):
        normalize_device_map({"layers": value})


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has that GPU")
@pytest.mark.parametrize("value", [7, "cuda:7", torch.device("cuda", 7)], ids=str)
def test_an_absent_gpu(value):
    with pytest.raises(PlacementError, match=r"this machine has \d CUDA devices"):
        normalize_device_map({"": value})


@pytest.mark.gpu
def test_gpu_values():
    assert normalize_device_map({"a": 0, "b": "cuda:0", "c": torch.device("cuda"), "d": "cuda"}) == dict.fromkeys(
        "abcd", "cuda:0"
    )


def test_place_of_is_the_longest_key():
    places = {"": "cuda:0", "layers": "cpu", "layers.1": "disk"}
    assert place_of(places, "layers.1.attn.weight") == "disk"
    assert place_of(places, "layers.10.attn.weight") == "cpu"
    assert place_of(places, "head") == "cuda:0"
    assert place_of({"layers": "cpu"}, "head.weight") is None


def test_coverage_errors_come_together():
    with pytest.raises(PlacementError) as error:
        check_device_map(
            {"layer": "cpu", "embed": "cpu"}, ["layers", "embed"], [("layers.w",), ("embed.w", "head.w"), ("gain",)]
        )
    message = str(error.value)
    assert "key 'layer' names no module or parameter; near: layers" in message
    assert "layers.w has no place" in message
    assert "gain has no place" in message


def test_execution_device_is_the_first_gpu_in_the_order_of_the_map():
    for first, second in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
        assert execution_device({"a": "disk", "b": first, "c": second}) == torch.device(first)
    assert execution_device({"a": "cpu", "b": "disk"}) == torch.device("cpu")


def test_cpu_is_an_offload_only_where_a_gpu_runs():
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert [is_offloaded(place, gpu) for place in ("cuda:0", "cpu", "disk", None)] == [False, True, True, False]
    assert [is_offloaded(place, cpu) for place in ("cpu", "disk", None)] == [False, True, False]


def test_as_user_map():
    assert as_user_map({"a": "cuda:1", "b": "cpu", "c": "disk"}) == {"a": 1, "b": "cpu", "c": "disk"}


class TestInfer:
    def test_what_fits_is_one_entry(self):
        assert infer_places(model(), {"cuda:0": 502, "cpu": 0}) == {"": "cuda:0"}

    def test_blocks_stay_whole(self):
        places = infer_places(model(), {"cuda:0": 300, "cuda:1": 300})
        assert places["layers.0"] == places["layers.1"] == "cuda:0"
        assert places["layers.2"] == places["layers.3"] == places["head"] == "cuda:1"
        assert not any(name.endswith((".a", ".b")) for name in places)

    def test_a_spill_leaves_room_for_two_of_the_largest_block(self):
        # 460 on the GPU would take all but half a block; with 200 kept free for lending, one block.
        places = infer_places(model(), {"cuda:0": 460, "cpu": 1000})
        assert [name for name, place in places.items() if place == "cuda:0"] == ["gain", "embed", "layers.3", "head"]
        assert list(places) == ["gain", "embed", "layers.0", "layers.1", "layers.2", "layers.3", "head"]

    def test_what_is_in_no_stack_stays_first(self):
        places = infer_places(model(), {"cuda:0": 302, "cpu": 1000})
        assert [name for name, place in places.items() if place == "cuda:0"] == ["gain", "embed", "head"]

    def test_only_what_is_offloaded_needs_room(self):
        places = infer_places(model(embed=5000), {"cuda:0": 10_302, "cpu": 1000})
        assert [name for name, place in places.items() if place == "cpu"] == ["layers.0", "layers.1", "layers.2"]

    def test_buffers_stay_on_the_gpu(self):
        assert infer_places(model(), {"cuda:0": 402, "cpu": 1000})["layers.3"] == "cuda:0"
        places = infer_places(model(), {"cuda:0": 402, "cpu": 1000}, buffer_nbytes=1)
        assert places["layers.3"] == "cpu"
        assert infer_places(model(), {"cuda:0": 502, "cpu": 0}, buffer_nbytes=1) == {"": "cuda:0"}

    @pytest.mark.parametrize(
        "resident, expected",
        [(0, "--------"), (1, "-------g"), (2, "---g---g"), (4, "-g-g-g-g"), (5, "-g-gg-gg")],
        ids=["none", "1", "2", "4", "5"],
    )
    def test_resident_blocks_are_strided(self, resident, expected):
        places = infer_places(model(blocks=8), {"cuda:0": 302 + 100 * resident, "cpu": 1000})
        assert "".join("g" if place_of(places, f"layers.{i}") == "cuda:0" else "-" for i in range(8)) == expected

    @pytest.mark.parametrize(
        "resident, expected",
        [(1, "----g111"), (2, "--g--g11"), (3, "-g-g-g11"), (5, "ggggg111")],
        ids=["1", "2", "3", "all"],
    )
    def test_blocks_of_the_first_of_several_gpus_are_strided_before_those_of_the_others(self, resident, expected):
        second = 100 * expected.count("1")
        spills = {"cuda:0": 302 + 100 * resident, "cuda:1": second, "cpu": 1000}
        budgets = spills if "-" in expected else {"cuda:0": 552, "cuda:1": 352, "cpu": 0}
        places = infer_places(model(blocks=8), budgets)
        kinds = {"cuda:0": "g", "cuda:1": "1", "cpu": "-"}
        assert "".join(kinds[place_of(places, f"layers.{i}")] for i in range(8)) == expected
        assert place_of(places, "embed") == "cuda:0"
        assert place_of(places, "head") == ("cuda:0" if "-" in expected else "cuda:1")

    def test_a_tied_head_goes_where_the_embedding_went(self):
        places = infer_places(model(tied=True), {"cuda:0": 452, "cpu": 1000})
        assert places == {"": "cuda:0"}
        places = infer_places(model(tied=True), {"cuda:0": 300, "cpu": 1000})
        assert places["head"] == places["embed"] == "cuda:0"

    def test_a_module_seen_before_goes_where_it_went(self):
        shared = block("layers.0", 100)
        again = Node(name="tail", tensors=(), children=shared.children, is_atomic=True)
        root = Node(name="", tensors=(), children=(shared, block("layers.1", 100), again), is_atomic=False)
        places = infer_places(root, {"cuda:0": 100, "cuda:1": 100})
        assert places == {"layers.0": "cuda:0", "layers.1": "cuda:1", "tail": "cuda:0"}

    def test_the_disk_comes_last(self):
        places = infer_places(model(), {"cuda:0": 402, "cpu": 120, "disk": 1 << 60})
        assert places["layers.0"] == "cpu"
        assert places["layers.1"] == places["layers.2"] == "disk"

    def test_what_does_not_fit_is_refused_with_the_sizes(self):
        with pytest.raises(PlacementError, match=r"does not fit: layers\.\d is left over.*offload_folder"):
            infer_places(model(), {"cuda:0": 300, "cpu": 160})

    def test_what_is_offloaded_counts_with_the_bytes_it_has_there(self):
        layers = tuple(
            Node(name=f"layers.{i}", tensors=(Sized(f"layers.{i}.w", i, 100, 250),), children=(), is_atomic=True)
            for i in range(4)
        )
        root = Node(name="", tensors=(), children=layers, is_atomic=False)
        assert infer_places(root, {"cuda:0": 400, "cpu": 0}) == {"": "cuda:0"}
        places = infer_places(root, {"cuda:0": 350, "cpu": 750}, slots=1)
        assert [places[f"layers.{i}"] for i in range(4)] == ["cpu", "cpu", "cpu", "cuda:0"]
        with pytest.raises(PlacementError, match="does not fit"):
            infer_places(root, {"cuda:0": 350, "cpu": 749}, slots=1)
        places = infer_places(root, {"cuda:0": 350, "cpu": 749, "disk": 250}, slots=1)
        assert [places[f"layers.{i}"] for i in range(4)] == ["cpu", "cpu", "disk", "cuda:0"]

    def test_a_gpu_without_room_for_what_is_lent_is_left_out_and_the_cpu_runs(self):
        layers = tuple(
            Node(name=f"layers.{i}", tensors=(Sized(f"layers.{i}.w", i, 100, 250),), children=(), is_atomic=True)
            for i in range(4)
        )
        root = Node(name="", tensors=(), children=layers, is_atomic=False)
        assert infer_places(root, {"cuda:0": 249, "cpu": 800}, slots=1) == {"": "cpu"}
        places = infer_places(root, {"cuda:0": 90, "cpu": 399, "disk": 9999}, slots=1)
        assert [places[f"layers.{i}"] for i in range(4)] == ["cpu", "disk", "disk", "disk"]

    def test_a_module_around_blocks_borrows_beside_the_slots(self):
        layers = tuple(block(f"layers.{i}", 100) for i in range(4))
        body = Node(name="layers", tensors=(), children=layers, is_atomic=False, is_called=False)
        root = Node(name="", tensors=(Sized("gain", "gain", 30, 30),), children=(body,), is_atomic=False)
        places = {"gain": "cpu", **{f"layers.{i}": "cpu" if i else "cuda:0" for i in range(4)}}
        assert onload_nbytes(root, places, torch.device("cuda:0")) == {"cuda:0": 230}

    def test_an_offloaded_module_outside_of_stacks_is_lent_in_one_piece(self):
        mlp = Node(name="mlp", tensors=(), children=(leaf("mlp.a", 100), leaf("mlp.b", 60)), is_atomic=False)
        root = Node(name="", tensors=(), children=(leaf("embed", 50), mlp), is_atomic=False)
        places = {"embed": "cuda:0", "mlp": "cpu"}
        assert onload_nbytes(root, places, torch.device("cuda:0")) == {"cuda:0": 160}
        places = {"embed": "cuda:0", "mlp.a": "cpu", "mlp.b": "cpu"}
        assert onload_nbytes(root, places, torch.device("cuda:0")) == {"cuda:0": 200}

    def test_every_tensor_has_a_place(self):
        places = infer_places(model(), {"cuda:0": 200, "cpu": 200, "disk": 1000})
        names = [
            "gain",
            "embed.weight",
            "head.weight",
            *(f"layers.{i}.{part}.weight" for i in range(4) for part in "ab"),
        ]
        assert all(place_of(places, name) for name in names)

    def test_balanced_shares_evenly(self):
        budgets = balanced_budgets(model(), {"cuda:0": 10_000, "cuda:1": 10_000, "cpu": 0}, "balanced")
        places = infer_places(model(), budgets)
        assert places["layers.0"] == places["layers.1"] == "cuda:0"
        assert places["layers.3"] == places["head"] == "cuda:1"

    def test_balanced_low_0_spares_the_first(self):
        budgets = balanced_budgets(model(), {"cuda:0": 10_000, "cuda:1": 10_000, "cuda:2": 10_000}, "balanced_low_0")
        places = infer_places(model(), budgets)
        assert set(places.values()) == {"cuda:1", "cuda:2"}

    def test_sequential_fills_the_first(self):
        budgets = balanced_budgets(model(), {"cuda:0": 10_000, "cuda:1": 10_000}, "sequential")
        assert infer_places(model(), budgets) == {"": "cuda:0"}


class TestInferDeviceMap:
    def test_sizes_are_those_of_the_loaded_model(self, tiny, empty):
        config = QuantizationConfig("nf4")
        total = memory_footprint(load_and_quantize_model(tiny(), None, config, "cpu")).total_nbytes
        assert infer_device_map(empty(tiny), config, max_memory={"cpu": total}) == {"": "cpu"}
        short = infer_device_map(empty(tiny), config, max_memory={"cpu": total - 1}, offload_folder="anywhere")
        assert set(short.values()) == {"cpu", "disk"}

    def test_a_strategy_that_is_none(self, tiny, empty):
        with pytest.raises(PlacementError, match="device_map is 'fast'; expected one of"):
            infer_device_map(empty(tiny), QuantizationConfig("nf4"), "fast")

    def test_buffers_of_a_split_module_stay_in_the_map(self, tiny, empty):
        memory = {"cpu": 40_000}
        places = infer_device_map(empty(tiny), QuantizationConfig("nf4"), max_memory=memory, offload_folder="anywhere")
        assert {"gain", "offset", "steps"} <= set(places)
