"""Slots: kernels and reference give each weight the slot that a plain list of used slots gives it, and fill it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigq import ops
from bigq.ops import reference
from bigq_kernels import checks, slots

IMPLEMENTATIONS = {"kernels": slots, "reference": reference, "ops": ops}


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def implementation(request):
    return request.param


class Lru:
    """What `assign_slots` does, with lists: `order` has the slots by their last call, the oldest first."""

    def __init__(self, count):
        self.held, self.order = {}, [(0, slot) for slot in range(count)]
        self.calls = 0

    def call(self, ids, weights):
        self.calls += 1
        hit = [id for id in ids if 0 <= id < weights]
        kept = {self.held[id] for id in hit if id in self.held}
        copies = []
        for id in hit:
            if id not in self.held:
                slot = next(slot for _, slot in sorted(self.order) if slot not in kept)
                self.held = {weight: own for weight, own in self.held.items() if own != slot}
                self.held[id] = slot
                kept.add(slot)
                copies.append((id, slot))
        self.order = [(self.calls if slot in kept else call, slot) for call, slot in self.order]
        return [self.held[id] if 0 <= id < weights else -1 for id in ids], copies


class Slots:
    """The tensors of some slots, filled from parts of `weights` weights with `implementation`."""

    def __init__(self, implementation, weights, count, device):
        self.implementation, self.weights = implementation, weights
        self.held = torch.full((count,), -1, dtype=torch.int32, device=device)
        self.stamps = torch.zeros(count, dtype=torch.int64, device=device)
        shapes = (7, torch.int32), (5000, torch.int16), (1, torch.uint8)
        self.sources = [torch.randint(0, 100, (weights, n), device=device).to(dtype) for n, dtype in shapes]
        self.pools = [torch.zeros(count, n, dtype=dtype, device=device) for n, dtype in shapes]

    def call(self, ids, dtype=torch.int64):
        given = torch.tensor(ids, dtype=dtype, device=self.held.device)
        found, copies = self.implementation.assign_slots(given, self.held, self.stamps, self.weights)
        assert found.dtype == copies.dtype == torch.int32
        assert copies.shape == (len(ids), 2)
        self.implementation.fill_slots(copies, self.sources, self.pools)
        for id, slot in zip(ids, found.tolist(), strict=True):
            if slot >= 0:
                assert all(torch.equal(p[slot], s[id]) for p, s in zip(self.pools, self.sources, strict=True))
        made = [tuple(copy) for copy in copies.tolist()]
        used = sum(copy != (-1, -1) for copy in made)
        assert made[used:] == [(-1, -1)] * (len(made) - used), "the copies come first"
        return found.tolist(), made[:used]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "weights, count, most",
    [
        pytest.param(9, 5, 5, id="a-few-slots"),
        pytest.param(30, 24, 6, id="many-slots"),
        pytest.param(3, 8, 4, id="fewer-weights-than-slots"),
        pytest.param(1, 1, 1, id="one-weight"),
        pytest.param(6, 1, 1, id="one-slot"),
        pytest.param(20, 17, 17, id="as-many-rows-as-slots"),
    ],
)
def test_random_calls_take_the_slots_that_were_not_used_for_longest(
    implementation, weights, count, most, dtype, device
):
    own, model, hits, misses = Slots(implementation, weights, count, device), Lru(count), 0, 0
    for _ in range(25):
        ids = torch.randint(-1, weights + 1, (int(torch.randint(0, most + 1, ())),)).tolist()
        found, copies = own.call(ids, dtype)
        assert (found, copies) == model.call(ids, weights)
        hits, misses = hits + len(set(found) - {-1}) - len(copies), misses + len(copies)
    assert misses > 0
    assert hits > 0 or weights > 5 * count


def test_calls_by_hand(implementation, device):
    own = Slots(implementation, 10, 3, device)
    assert own.call([4, 4, 7]) == ([0, 0, 1], [(4, 0), (7, 1)])  # one copy for two rows
    assert own.call([7]) == ([1], [])
    assert own.call([2]) == ([2], [(2, 2)])  # the empty slot
    assert own.call([9]) == ([0], [(9, 0)])  # 4 was not used for longest
    assert own.call([5, 7]) == ([2, 1], [(5, 2)])  # 7 is hit in this call, and 2 is the next
    assert own.call([-1, 10, 3]) == ([-1, -1, 0], [(3, 0)])
    assert own.held.tolist() == [3, 7, 5]
    own.held.fill_(-1)  # so weights are dropped
    assert own.call([3, 5, 7]) == ([1, 2, 0], [(3, 1), (5, 2), (7, 0)])


def test_of_slots_that_were_used_in_one_call_the_first_is_taken(implementation, device):
    own = Slots(implementation, 10, 4, device)
    own.call([0, 1, 2, 3])
    own.call([3, 2, 1, 0])
    assert own.call([8, 9]) == ([0, 1], [(8, 0), (9, 1)])


def test_an_id_that_needs_more_than_32_bits_is_no_weight(implementation, device):
    own = Slots(implementation, 10, 4, device)
    assert own.call([4]) == ([0], [(4, 0)])
    assert own.call([4 + 2**32, 4 - 2**32]) == ([-1, -1], [])


def test_parts_are_copied_whole_and_nothing_else_is_written(implementation, device):
    whole = slots.WORDS
    numels = [whole - 1, whole, whole + 1, 2 * whole, 3, 1, 2, 5]
    assert len(numels) == checks.MAX_PARTS
    sources = [torch.randint(1, 1 << 30, (4, n), dtype=torch.int32, device=device) for n in numels]
    pools = [torch.zeros(3, n, dtype=torch.int32, device=device) for n in numels]
    copies = torch.tensor([[3, 0], [1, 2], [-1, -1]], dtype=torch.int32, device=device)
    implementation.fill_slots(copies, sources, pools)
    for source, pool in zip(sources, pools, strict=True):
        assert torch.equal(pool[[0, 2]], source[[3, 1]])
        assert not pool[1].any()


REFUSED = {
    "more ids than slots": ({"held": 3, "stamps": 3}, r"ids is \[4\] and held \[3\]; expected a slot for each id"),
    "stamps of other slots": ({"stamps": 5}, r"stamps is torch\.int64 \[5\].*expected torch\.int64 \[4\]"),
}


@pytest.mark.parametrize("sizes, message", REFUSED.values(), ids=REFUSED.keys())
def test_slots_that_do_not_fit_are_refused(implementation, sizes, message, device):
    ids, held = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(sizes.get("held", 4), device=device).int()
    stamps = torch.zeros(sizes.get("stamps", 4), dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=message):
        implementation.assign_slots(ids, held, stamps, 9)


def test_dtypes_of_slots_are_checked(implementation, device):
    ids, held, stamps = (
        torch.zeros(4, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32, torch.int64)
    )
    for given, message in (
        ((ids.short(), held, stamps), r"ids is torch\.int16"),
        ((ids, held.long(), stamps), r"held is torch\.int64 .*expected torch\.int32 \[4\]"),
        ((ids, held, stamps.int()), r"stamps is torch\.int32 .*expected torch\.int64 \[4\]"),
        ((ids[:2], held[::2], stamps[:2]), r"held or stamps is not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            implementation.assign_slots(*given, 9)


def test_parts_that_do_not_fit_are_refused(implementation, device):
    copies = torch.zeros(2, 2, dtype=torch.int32, device=device)
    source, pool = torch.zeros(6, 4, device=device), torch.zeros(3, 4, device=device)
    for given, message in (
        ((copies.long(), [source], [pool]), r"copies is torch\.int64 .*expected torch\.int32 \[2, 2\]"),
        ((copies, [source], [pool, pool]), r"there are 1 sources and 2 pools; expected as many, 1 to 8"),
        ((copies, [], []), r"there are 0 sources"),
        ((copies, [source] * 9, [pool] * 9), r"there are 9 sources and 9 pools; expected as many, 1 to 8"),
        ((copies, [source[:, :3].contiguous()], [pool]), r"a source is .* \[6, 3\].*expected .* \[6, 4\]"),
        ((copies, [source.half()], [pool]), r"a source is torch\.float16"),
        ((copies, [source, source[:5]], [pool, pool]), r"a source is .* \[5, 4\].*expected .* \[6, 4\]"),
        ((copies, [source, source], [pool, pool[:2]]), r"a pool is .* \[2, 4\].*expected .* \[3, 4\]"),
        ((copies, [source.T.contiguous().T], [pool]), r"a source is not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            implementation.fill_slots(*given)


BUILD = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from bigq_kernels.slots import WARPS, WORDS, _assign_slots_kernel, _fill_slots_kernel

def build(kernel, types, constants, warps):
    index = kernel.arg_names.index
    assert {*types, *constants} == {*kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(index(name),): [["tt.divisibility", 16]] for name, type in types.items() if type[0] == "*"}
    source = ASTSource(kernel, signature, {(index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": warps, "launch_pdl": True}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for ids, count in (("*i64", 16), ("*i64", 32), ("*i32", 512)):
    types = dict(ids_ptr=ids, held_ptr="*i32", stamps_ptr="*i64", slots_ptr="*i32", copies_ptr="*i32")
    ptx = build(_assign_slots_kernel, types | dict.fromkeys("RES", "i32"), dict(BLOCK_S=count, PDL=True), 1)
    print(ptx.count("griddepcontrol.wait"), ptx.count("bar.sync"), ptx.count("st.local"), 0)
words = [393216, 49152, 768, 196608, 24576, 1024, 0, 0]  # of an expert of Qwen3-30B-A3B, with biases
types = {"copies_ptr": "*i32"} | {f"{way}{i}": "*i32" for i, n in enumerate(words) if n for way in ("from", "to")}
constants = {f"{way}{i}": None for i, n in enumerate(words) if not n for way in ("from", "to")}
constants |= {f"N{i}": n for i, n in enumerate(words)} | dict(WORDS=WORDS, PDL=True)
ptx = build(_fill_slots_kernel, types, constants, WARPS)
print(ptx.count("griddepcontrol.wait"), ptx.count("bar.sync"), ptx.count("ld.global.v4"), ptx.count("st.global.v4"))
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here():
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root / "triton_kernels")
    done = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *assigned, filled = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert assigned == [(1, 0, 0, 0)] * 3  # one warp needs no barrier
    loads = 6 * slots.WORDS // (4 * 32 * slots.WARPS)  # of 16 bytes
    assert filled == (1, 0, loads, loads)
