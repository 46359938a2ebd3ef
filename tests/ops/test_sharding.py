"""Ops of DTensors give what they give on whole tensors, and shards stay where they are if none cuts a block."""

from dataclasses import replace

import pytest
import torch

from bigq import FP4, NF4, Int8
from bigq.ops import eager
from bigq.ops.sharding import register_rules
from bigq.weight.stored import Stored
from ranks import error_of, mesh_of, run_ranks

FORMATS = {
    "nf4": NF4(),
    "nf4-double-quant": NF4(block_size=32, double_quant=True),
    "fp4": FP4(block_size=128),
    "int8": Int8(threshold=2.0),
}
SHAPES = {"even": (64, 512), "uneven": (67, 512), "fewer-rows-than-ranks": (1, 512), "odd": (12, 129)}


def _cases(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    register_rules()
    found = {}

    def spread(tensor, *placements):
        return distribute_tensor(tensor, mesh, placements)

    def spread_state(state, dim):
        """Parts that a weight has one of a row, or several of, by `dim`; what is of one number in it is replicated."""
        return {
            part: spread(tensor, Shard(dim) if tensor.dim() > max(dim, 1) and tensor.shape[dim] > 1 else Replicate())
            for part, tensor in state.items()
        }

    def compare(key, out, expected, *, exact=True):
        whole, expected = out.detach().full_tensor(), expected.detach()
        assert whole.dtype == expected.dtype
        if exact:
            error = 0.0 if torch.equal(whole, expected) else float("inf")
        else:
            error = float((whole - expected).norm() / expected.norm())
        found[key] = (error, str(out.placements[0]))

    for name, own in FORMATS.items() if world == 2 else list(FORMATS.items())[:2]:
        for kind, (rows, columns) in SHAPES.items() if world == 2 else list(SHAPES.items())[:2]:
            torch.manual_seed(0)
            key = (name, kind)
            weight = torch.randn(rows, columns)
            state = own.quantize(weight)
            by_rows = spread_state(state, 0)
            for dtype in (torch.bfloat16, torch.float32):
                dense = own.dequantize(by_rows, (rows, columns), dtype)
                compare((*key, f"dequantize-{dtype}"), dense, own.dequantize(state, (rows, columns), dtype))
            compare((*key, "scales"), own.scales(by_rows), own.scales(state))
            for part, tensor in own.quantize(spread(weight, Shard(0))).items():
                compare((*key, f"quantize-{part}"), tensor, state[part])
            if "search" in own.methods and kind == "even":
                importance = torch.rand(columns) + 0.5
                searched = own.quantize(weight, method="search", importance=importance)
                shards = own.quantize(
                    spread(weight, Shard(0)), method="search", importance=spread(importance, Replicate())
                )
                for part, tensor in shards.items():
                    compare((*key, f"search-{part}"), tensor, searched[part])
            x, bias = torch.randn(3, 5, columns), torch.randn(rows)
            grad = torch.randn(3, 5, rows)
            leaf = x.clone().requires_grad_()
            expected = own.linear(leaf, state, bias, columns)
            expected.backward(grad)
            for how, placement in (("replicated-x", Replicate()), ("tokens", Shard(0))):
                sharded_x = spread(x, placement).requires_grad_()
                out = own.linear(sharded_x, by_rows, spread(bias, Shard(0)), columns)
                compare((*key, f"linear-{how}"), out, expected, exact=False)
                out.backward(spread(grad, Replicate()))
                compare((*key, f"gradient-{how}"), sharded_x.grad, leaf.grad, exact=False)
            sharded_x = spread(x, Shard(2)).requires_grad_()
            out = own.linear(sharded_x, spread_state(state, 1), spread(bias, Replicate()), columns)
            compare((*key, "linear-columns"), out, expected, exact=False)
            out.backward(spread(grad, Replicate()))
            compare((*key, "gradient-columns"), sharded_x.grad, leaf.grad, exact=False)
    _stacks(spread, compare)
    _uneven_stacks(spread, spread_state, compare)
    state = spread_state(NF4().quantize(torch.ones(64, 512)), 0)
    refused = error_of(lambda: NF4().linear(spread(torch.ones(3, 511), Replicate()), state, None, 512))
    return {"found": found, "refused": refused}


def _stacks(spread, compare):
    from torch.distributed.tensor import Replicate, Shard

    torch.manual_seed(0)
    own, weight = NF4(), torch.randn(4, 32, 256)
    state = own.quantize(weight)
    x, bias = torch.randn(9, 256), torch.randn(4, 32)
    stops = torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    ids = torch.tensor([3, 1, 0, 0, 2, 3, 3, 1, 2])
    whole = Replicate()
    for sorted_rows, route in ((True, stops), (False, ids)):
        op, _, settings = own.stack_product(256, sorted_rows=sorted_rows)
        leaf = x.clone().requires_grad_()
        expected = _routed(op, leaf, route, state, bias, settings)
        slopes = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
        expected.backward(slopes)
        for how, dim, of_x in (("rows", 1, whole), ("columns", 2, Shard(1)), ("weights", 0, whole)):
            parts = {part: spread(tensor, Shard(dim)) for part, tensor in state.items()}
            placed = spread(bias, Shard(1) if how == "rows" else whole)
            sharded_x = spread(x, of_x).requires_grad_()
            out = _routed(op, sharded_x, spread(route, whole), parts, placed, settings)
            compare((op, how), out, expected, exact=False)
            if sorted_rows:  # the gradient of the other sorts the rows, for which torch has no rule
                out.backward(spread(slopes, whole))
                compare((op, how, "gradient"), sharded_x.grad, leaf.grad, exact=False)
    weight = torch.randn(6, 32, 256)
    for name, own in FORMATS.items():
        state = own.quantize(weight)
        parts = {part: spread(tensor, Shard(0) if tensor.dim() == 3 else whole) for part, tensor in state.items()}
        dense = own.dequantize(parts, (6, 32, 256), torch.bfloat16)
        compare((name, "stack"), dense, own.dequantize(state, (6, 32, 256), torch.bfloat16))


def _uneven_stacks(spread, spread_state, compare):
    """Seven weights, which neither two nor three processes have alike many of."""
    from torch.distributed.tensor import Replicate, Shard

    shape = (7, 32, 256)
    weight, x = torch.randn(shape), torch.randn(7, 5, 256)
    for name, own in FORMATS.items():
        for transposed in (False, True):
            state = own.quantize(weight)
            whole = Stored(format=own, state=state, shape=shape, transposed=transposed, compute_dtype=None)
            parts = replace(whole, state=spread_state(state, 0))
            key, dense = (name, "seven", transposed), whole.dequantize(torch.float32)
            compare((*key, "dequantize"), parts.dequantize(torch.float32), dense)
            changed = dense + 0.01
            expected = whole.quantize(changed)
            for part, tensor in parts.quantize(spread(changed, Shard(0))).items():
                compare((*key, f"quantize-{part}"), tensor, expected[part])
        leaf, sharded_x = x.clone().requires_grad_(), spread(x, Replicate()).requires_grad_()
        out, expected = parts.batched_linear(sharded_x), whole.batched_linear(leaf)
        compare((name, "seven", "bmm"), out, expected, exact=False)
        expected.backward(torch.ones(7, 5, 32))
        out.backward(spread(torch.ones(7, 5, 32), Replicate()))
        compare((name, "seven", "bmm gradient"), sharded_x.grad, leaf.grad, exact=False)


def _cut_twice(rank):
    """Whether stacks whose weights two dimensions of a mesh cut, decode to what they do whole."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, found = mesh_of(2, 2), {}
    register_rules()
    for count in (2, 5, 6, 8):  # six are three for each half of the processes, and two and one for each of these
        torch.manual_seed(0)
        state = NF4().quantize(torch.randn(count, 32, 256))
        whole = Stored(format=NF4(), state=state, shape=(count, 32, 256), transposed=False, compute_dtype=None)
        for cut in ((Shard(0), Shard(0)), (Replicate(), Shard(0)), (Shard(0), Replicate())):
            parts = {
                part: distribute_tensor(tensor, mesh, cut if tensor.dim() == 3 else [Replicate()] * 2)
                for part, tensor in state.items()
            }
            dense = replace(whole, state=parts).dequantize(torch.float32)
            found[count, cut] = torch.equal(dense.full_tensor(), whole.dequantize(torch.float32))
    return found


def _routed(op, x, route, state, bias, settings):
    return eager.routed(op, x, route, (state["packed"], state["absmax"], bias, None, None), settings[-3:])


@pytest.fixture(
    scope="module", params=[pytest.param(2, id="2-ranks"), pytest.param(3, id="3-ranks", marks=pytest.mark.slow)]
)
def cases(request, tmp_path_factory):
    return run_ranks(_cases, tmp_path_factory.mktemp("sharding"), world=request.param)


def test_every_result_is_that_of_whole_tensors(cases):
    for rank, found in enumerate(result["found"] for result in cases):
        assert len(found) == (241 if len(cases) == 2 else 103)
        for key, (error, _) in found.items():
            # Sums in float32, in another order. LLM.int8() rounds each shard of a row of x by the largest of the shard.
            limit = 2e-2 if key[0] == "int8" and key[-1] == "linear-columns" else 1e-5
            assert error < limit, (rank, key)


@pytest.mark.slow  # four processes
def test_stacks_that_are_cut_twice_decode_to_those_of_whole_tensors(tmp_path):
    for found in run_ranks(_cut_twice, tmp_path, world=4):
        assert len(found) == 12
        assert all(found.values()), found


@pytest.mark.parametrize("name", FORMATS)
def test_shards_are_not_gathered_where_none_cuts_a_block(cases, name):
    found, world = cases[0]["found"], len(cases)
    if world == 3 and name not in ("nf4", "nf4-double-quant"):
        return
    nested_fits = name != "nf4-double-quant" or world == 2  # 64 rows of 16 scales: 512 for each of two ranks
    rows = {"dequantize-torch.bfloat16": "S(0)", "scales": "S(0)", "quantize-packed": "S(0)"}
    products = {"linear-replicated-x": "S(2)", "gradient-replicated-x": "P(sum)"}
    for step, placement in (rows | products).items():
        expected = "R" if not nested_fits and step in ("scales", "linear-replicated-x") else placement
        assert found[name, "even", step][1] == expected, step
    is_whole = name == "nf4-double-quant" or (world == 3 and name != "int8")  # 512 columns are no three times a block
    assert found[name, "even", "linear-columns"][1] == ("R" if is_whole else "P(sum)")


def test_another_width_is_refused_as_with_whole_tensors(cases):
    for result in cases:
        assert result["refused"].startswith(
            "RuntimeError: x is [3, 511]; expected [..., 512], the in_features of the weight"
        )
