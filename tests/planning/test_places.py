"""Automatic placements: what a plan stores in each place, and lends, stays within that place's budget."""

import random
from collections import Counter

import pytest
import torch
from torch import nn

from bigq import PlacementError, QuantizationConfig
from bigq.infer_device_map import infer_device_map
from bigq.model.in_place import ModelTensors
from bigq.model.tree import ModelTree
from bigq.offload.dispatch import _units
from bigq.planning.device_map import execution_device, is_gpu, is_offloaded
from bigq.planning.places import plan_and_place
from bigq.planning.storage_places import storage_places

POLICIES = [None, "quantized", "preserve", torch.float32]


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch):
    """Places need no GPU, only its name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


class Block(nn.Module):
    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        if draw.random() < 0.2:
            self.gain = nn.Parameter(torch.ones(width))
        if draw.random() < 0.2:
            self.register_buffer("offset", torch.ones(width))

    def forward(self, x):
        return x


class Stacks(nn.Module):
    """Stacks of blocks, modules outside of them, tensors of the root, now and then ties and a module on two paths."""

    def __init__(self, draw: random.Random, *, odd: bool) -> None:
        super().__init__()
        width = draw.choice([32, 64, 96])
        self.embed = nn.Embedding(draw.randint(8, 200), width)
        self.mlp = Block(width, draw)
        self.stacks = nn.ModuleList(
            nn.ModuleList(Block(draw.choice([width, 64]) if odd else width, draw) for _ in range(draw.randint(1, 8)))
            for _ in range(draw.randint(1, 2))
        )
        self.head = nn.Linear(width, self.embed.num_embeddings, bias=False)
        if odd:
            self.gain = nn.Parameter(torch.ones(width))
            self.register_buffer("mask", torch.ones(draw.randint(1, 500)))
            if draw.random() < 0.5:
                self.head.weight = self.embed.weight
            if draw.random() < 0.3:
                self.stacks[0][-1] = self.stacks[0][0]
            if draw.random() < 0.3:
                self.mlp = self.stacks[0][0]

    def forward(self, x):
        return x


def used_nbytes(model, plan, places):
    """What `plan` keeps in each place, and what the units of `dispatch` are lent of it on the device they run on."""
    resting, runs_on = storage_places(plan, places), execution_device(places)
    used, sizes = Counter(), {}
    for tensor in plan.tensors:
        sizes |= dict.fromkeys(tensor.names, (resting[tensor.names[0]], tensor.spec.nbytes))
        used[resting[tensor.names[0]]] += tensor.spec.nbytes
    for weight in plan.weights:
        place = resting[weight.names[0]]
        sizes |= dict.fromkeys(weight.names, (place, weight.nbytes))
        used[place] += weight.nbytes
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    lent = {}
    for unit in _units(model, places):
        held = {names[id(tensor)]: sizes[names[id(tensor)]] for _, _, tensor, _ in unit.tensors}
        gpus = [place for place, _ in held.values() if is_gpu(place)]
        nbytes = sum(nbytes for place, nbytes in held.values() if is_offloaded(place, runs_on))
        if nbytes:
            lent[unit.path] = (gpus[0] if gpus else str(runs_on), nbytes)
    blocks = {}
    for path, (place, nbytes) in lent.items():
        if any(other != path and other.startswith(path and f"{path}.") for other in lent):  # it is around another
            used[place] += nbytes
        else:
            blocks.setdefault(place, []).append(nbytes)
    for place, sizes in blocks.items():
        used[place] += max(sizes) * min(2, len(sizes))
    return used


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_place_keeps_its_budget(policy):
    for seed in range(60):
        check_budgets(seed, policy)


def check_budgets(seed, policy):
    draw = random.Random(seed)
    model = Stacks(draw, odd=seed % 2 == 1).to(draw.choice([torch.bfloat16, torch.float32]))
    config = QuantizationConfig(draw.choice(["nf4", "int8"]), offload=policy, cast_buffers=draw.random() < 0.3)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    memory = {"cpu": int(total * draw.random() * 2)}
    for gpu in range(draw.choice([0, 1, 1] if seed % 2 else [0, 1, 1, 2])):  # a tie may not span two GPUs
        memory[gpu] = int(total * draw.random() * 0.6)
    if draw.random() < 0.5:
        memory["disk"] = total * 2
    strategy = draw.choice(["auto", "balanced", "balanced_low_0", "sequential"])
    options = {"max_memory": memory, "no_split_module_classes": ["Block"]}
    try:
        plan, places = plan_and_place(ModelTree(model), ModelTensors(model), config, strategy, **options)
    except PlacementError:
        assert memory["cpu"] + memory.get("disk", 0) < 4 * total, f"seed {seed}: so much room is enough for float32 too"
        return
    used = used_nbytes(model, plan, places)
    for place, nbytes in used.items():
        budget = memory[int(place[5:]) if is_gpu(place) else place]
        alone = place == "cpu" and not any(map(is_gpu, places.values()))  # it has to lend and to hold buffers
        assert nbytes <= budget or (alone and "cpu" not in places.values()), (seed, used, memory, places)


def test_what_keeps_its_dtype_on_the_cpu_stays_within_both_budgets():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)) for _ in range(16))

        def forward(self, x):
            return x

    model = Blocks().bfloat16()
    preserved = sum(tensor.nbytes for tensor in model.blocks[0].state_dict().values())
    memory = {0: 3 * preserved, "cpu": 13 * preserved + 13 * 4 * 256}
    config = QuantizationConfig("nf4", skip_modules=[])
    outcome = {}
    for policy in ("quantized", "preserve"):
        plan, places = plan_and_place(
            ModelTree(model), ModelTensors(model), config, "auto", max_memory=memory, offload=policy
        )
        used = used_nbytes(model, plan, places)
        outcome[policy] = sorted(Counter(places.values()).items())
        assert used["cuda:0"] <= memory[0]
        assert used["cpu"] <= memory["cpu"]
    assert outcome == {"quantized": [("cpu", 8), ("cuda:0", 8)], "preserve": [("cpu", 13), ("cuda:0", 3)]}
    preserving = QuantizationConfig("nf4", skip_modules=[], offload="preserve")
    same = infer_device_map(model, preserving, max_memory=memory)
    assert sorted(Counter(same.values()).items(), key=str) == [("cpu", 13), (0, 3)]
    with pytest.raises(PlacementError, match="does not fit"):
        infer_device_map(model, preserving, max_memory={**memory, "cpu": 12 * preserved})


@pytest.mark.parametrize("policy", ["preserve", torch.float32], ids=str)
def test_what_one_of_its_names_keeps_on_the_gpu_is_not_offloaded(policy):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = nn.Linear(64, 64), nn.Embedding(4, 64)
            self.again, self.embed = self.first, nn.Embedding(4, 64)
            self.embed.weight = self.other.weight
            self.head = nn.Linear(64, 4)

        def forward(self, x):
            return x

    model = Tied().bfloat16()
    device_map = {"first": "cpu", "again": 0, "other": "cpu", "embed": 0, "head": 0}
    config = QuantizationConfig("nf4")

    def planned():
        return plan_and_place(ModelTree(model), ModelTensors(model), config, device_map, offload=policy)

    plan, places = planned()
    assert storage_places(plan, places)["first.weight"] == "cuda:0"
    assert [weight.names for weight in plan.weights] == [("first.weight", "again.weight")]
    assert {tensor.spec.dtype for tensor in plan.tensors} == {torch.bfloat16}
    device_map["other"] = 1
    with pytest.raises(PlacementError, match=r"on several devices: other\.weight on cuda:1, embed\.weight on cuda:0"):
        storage_places(*planned())
