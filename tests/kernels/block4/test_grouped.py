"""Products of rows with a stack of 4-bit weights, each row by its own, against the same product row by row."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from bigq.ops import reference
from bigq_kernels.block4.bulk_config import tile_config
from bigq_kernels.block4.choose_grouped import choose_grouped, takes_rows
from bigq_kernels.block4.configs import WgmmaConfig, staged_config
from bigq_kernels.block4.dp4a import linear_4bit_dp4a
from bigq_kernels.block4.grouped import grouped_linear_4bit, routed_linear_4bit
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.block4.mma import linear_4bit_mma
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import group_tokens, most_tiles, weights_of_rows
from linear_cases import assert_within_budget, packed4, quantized_4bit

STOPS = {  # by what is special of them
    "all weights": [2, 5, 6, 9],
    "weights without rows": [0, 4, 4, 9],
    "one weight": [0, 0, 9, 9],
    "rows behind the last": [1, 3, 3, 7],
    "no rows": [0, 0, 0, 0],
}
S, E, N, K = 9, 4, 24, 64


def stack(quant_type, block_size, nested, device, e=E, n=N, k=K):
    """The tensors of a stack [e, n, k] and its exact weights [e, n, k]."""
    (weight, absmax, *scales), exact = quantized_4bit(e * n, k, quant_type, block_size, nested, device)
    return (weight.view(e, n, -1), absmax.view(e, n, -1), *scales), exact.view(e, n, k)


def row_by_row(x, dense, stops):
    out, start = x.new_zeros(len(x), dense.shape[1]), 0
    for e, stop in enumerate(stops):
        out[start:stop] = x[start:stop] @ dense[e].to(x.dtype).T
        start = stop
    return out


def with_bias(rows, bias, stops):
    ids = torch.searchsorted(
        torch.tensor(stops, device=rows.device), torch.arange(len(rows), device=rows.device), right=True
    )
    return rows + torch.cat([bias, bias.new_zeros(1, bias.shape[1])])[ids].to(rows.dtype)


def check(x, stops, tensors, exact, product, bias=None):
    out = torch.full((len(x), exact.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    got = product(x, torch.tensor(stops, dtype=torch.int32, device=x.device), tensors, out)
    got = out if got is None else got
    expected, baseline = row_by_row(x.double(), exact, stops), row_by_row(x, exact, stops)
    if bias is not None:
        expected, baseline = with_bias(expected, bias, stops), with_bias(baseline, bias, stops)
    assert_within_budget(got, expected, baseline)
    assert not got[stops[-1] :].any()


@pytest.mark.parametrize("stops", [pytest.param(stops, id=name) for name, stops in STOPS.items()])
@pytest.mark.parametrize("block_m", [1, 2, 16])
def test_tiles_of_tokens_cover_every_row_once(stops, block_m, device):
    count, out = torch.ones(700, dtype=torch.int32, device=device), torch.ones(S, N, device=device)
    groups = group_tokens(torch.tensor(stops, dtype=torch.int32, device=device), E, block_m, count, out)
    assert len(groups) == most_tiles(S, E, block_m)
    expected, tile = [], 0
    for e, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
        tiles = -(-(stop - start) // block_m)
        expected += [[e, start, stop - start, tile]] * tiles
        tile += tiles
    assert groups[:tile, :4].tolist() == expected
    assert (groups[:, 4] == tile).all()
    assert not groups[tile:, 2].any()
    assert groups[tile:, 3].tolist() == list(range(tile, len(groups)))
    assert not count.any()
    assert out[: stops[-1]].all()
    assert not out[stops[-1] :].any()


def test_stops_that_do_not_ascend_make_no_more_tiles_than_there_is_room_for(device):
    count, out = torch.ones(1, dtype=torch.int32, device=device), torch.ones(S, N, device=device)
    stops = torch.tensor([S, 0] * (E // 2) + [S] * (E % 2), dtype=torch.int32, device=device)
    groups = group_tokens(stops, E, 1, count, out)
    assert (groups[:, 4] == len(groups)).all()


@pytest.mark.parametrize("way", ["dp4a", "mma", "chosen"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double_quant"])
def test_each_way_multiplies_each_row_by_its_weight(way, nested, device):
    quant_type, block_size = ("fp4", 32) if nested else ("nf4", 64)
    tensors, exact = stack(quant_type, block_size, nested, device)
    packed = packed4(tensors, quant_type, block_size)
    gpu = replace(Gpu.of(torch.device(device)), gluon=False)
    # Few programs, because the interpreter takes 0.1 s for each.
    single = replace(choose_grouped(gpu, 2, E, N, K, block_size, torch.float16).config, block_n=8, blocks=3)
    several = replace(choose_grouped(gpu, S, E, N, K, block_size, torch.float16).config, block_m=8, split=2)

    bias = torch.randn(E, N, device=device).half()

    def product(x, stops, tensors, out):
        if way == "dp4a":
            return linear_4bit_dp4a(x, packed, bias, out, single, weights_of_rows(stops, S))
        if way == "mma":
            return linear_4bit_mma(x, packed, bias, out, several, stops)
        weight, absmax, *nested = tensors
        return grouped_linear_4bit(x, stops, weight, absmax, bias, *nested, quant_type, block_size, K)

    for name in ("weights without rows", "rows behind the last", *(STOPS if way != "dp4a" else ())):
        stops = STOPS[name]
        check(torch.randn(S, K, device=device).half(), stops, tensors, exact, product, bias)


@pytest.mark.parametrize("repeat", [1, 3])
def test_rows_in_any_order_have_their_own_weight(repeat, device):
    for nested, e in ((False, 24), (True, 2)):  # of 24 weights nine rows are few, and single; of two they are sorted
        tensors, exact = stack("nf4", 64, nested, device, e=e, n=8)
        x, bias = torch.randn(S // repeat, K, device=device).half(), torch.randn(e, 8, device=device).half()
        ids = torch.randint(0, e, (S,), device=device)
        ids[4], ids[7] = e, -1  # no weight has these
        weight, absmax, *scales = tensors
        args = (x, ids, weight, absmax, bias, *scales, "nf4", 64, K)
        each = x.repeat_interleave(repeat, dim=0)
        known = ids.clamp(0, e - 1)
        is_known = (ids == known)[:, None]
        expected = (torch.einsum("sk,snk->sn", each.double(), exact[known]) + bias[known]) * is_known
        baseline = (torch.einsum("sk,snk->sn", each, exact[known].half()) + bias[known]) * is_known
        for got in (routed_linear_4bit(*args), reference.routed_linear_4bit(*args)):
            assert_within_budget(got, expected, baseline)
            assert not got[[4, 7]].any()


def test_a_part_of_a_stack_has_the_bits_of_the_stack(device):
    """A row is multiplied by itself, as with all 24 weights. With three alone, rows are sorted."""
    weight, absmax, *_ = stack("nf4", 64, False, device, e=24, n=8)[0]
    x, bias = torch.randn(S, K, device=device).half(), torch.randn(24, 8, device=device).half()
    held = torch.tensor([20, 3, 11], device=device)
    ids = torch.tensor([0, 2, 1, -1, 0, 0, 3, 1, 2], device=device)  # -1 and 3 are no weight's
    rest = None, None, "nf4", 64, K
    whole_ids = torch.where((ids >= 0) & (ids < 3), held[ids.clamp(0, 2)], -1)
    whole = routed_linear_4bit(x, whole_ids, weight, absmax, bias, *rest)
    part = (weight[held], absmax[held], bias[held], *rest)
    assert torch.equal(routed_linear_4bit(x, ids, *part, weights=24), whole)
    assert whole[[0, 1, 2]].all()
    assert not takes_rows(choose_grouped(device, S, 3, 8, K, 64, x.dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("e", [24, 2], ids=["single", "sorted"])
def test_a_row_of_no_weight_is_zero_whatever_the_weights_are(e, value, device):
    weight, absmax, *_ = stack("nf4", 64, False, device, e=e, n=16)[0]
    x, bias = torch.randn(3, K, device=device).half(), torch.ones(e, 16, device=device)
    absmax[:] = value
    ids = torch.tensor([e, -1, e + 7], device=device)
    args = (x, ids, weight, absmax, bias, None, None, "nf4", 64, K)
    for got in (routed_linear_4bit(*args), reference.routed_linear_4bit(*args)):
        assert torch.equal(got, torch.zeros(3, 16, device=device).half())


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double_quant"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1024, 704], ids=["whole-steps", "partial-step"])
def test_gluon_multiplies_each_row_by_its_weight(k, dtype, quant_type, nested):
    staged, wgmma, bulk = (import_module(f"bigq_kernels.block4.gluon.{way}") for way in ("staged", "wgmma", "bulk"))
    e, n, rows = 9, 200, 700
    tensors, exact = stack(quant_type, 64, nested, "cuda", e=e, n=n, k=k)
    packed = packed4(tensors, quant_type, 64)
    x, bias = torch.randn(rows, k, device="cuda").to(dtype), torch.randn(e, n, device="cuda").to(dtype)
    ways = [(staged.linear_4bit_staged, staged_configs(tile, n, k)) for tile in (8, 16, 32)]
    ways += [(wgmma.linear_4bit_wgmma, [WgmmaConfig(block_m=tile)]) for tile in (32, 64)]
    tiles = (32, 64, 128, 256) if Gpu.of(x.device).bulk else ()
    ways += [(bulk.linear_4bit_bulk, [tile_config(tile, split) for split in (1, 2)]) for tile in tiles]
    for stops in (
        [0, 1, 1, 20, 84, 85, 300, 690, 690],
        [0, 0, 0, 0, 700, 700, 700, 700, 700],
        [77 * i for i in range(1, 10)],
        [0, 16, 48, 81, 145, 273, 466, 466, 700],  # as many rows as a loop has, one more, and a tile and some
    ):
        for way, configs in ways:
            for config in configs:

                def product(x, stops, tensors, out, way=way, config=config):
                    way(x, packed, bias, out, config, stops)

                check(x, stops, tensors, exact, product, bias)


def staged_configs(tile, n, k):
    config = staged_config(Gpu.named("h100"), tile, n, k, is_stack=True)
    return [replace(config, programs=programs) for programs in (3, 40, config.programs)]


def test_other_dtypes_and_widths_dequantize(device):
    def chosen(x, stops, tensors, out):
        weight, absmax, *nested = tensors
        return grouped_linear_4bit(x, stops, weight, absmax, None, *nested, "nf4", 64)

    for dtype, k in ((torch.float32, 64), (torch.float16, 50)):
        tensors, exact = stack("nf4", 64, False, device, k=k)
        check(torch.randn(S, k, device=device).to(dtype), STOPS["all weights"], tensors, exact, chosen)


def test_stops_and_ids_may_have_gaps_between_them(device):
    (weight, absmax, *nested), exact = stack("nf4", 64, False, device)
    x, stops = torch.randn(S, K, device=device).half(), STOPS["rows behind the last"]
    ids = torch.tensor([3, 0, 0, 2, 1, 1, 3, 2, 0], device=device)
    apart = torch.tensor([[stop, 99] for stop in stops], dtype=torch.int32, device=device)[:, 0]
    args = (weight, absmax, None, *nested, "nf4", 64)
    assert torch.equal(grouped_linear_4bit(x, apart, *args), grouped_linear_4bit(x, apart.contiguous(), *args))
    ids_apart = torch.stack([ids, ids + 1], dim=1)[:, 0]
    assert torch.equal(routed_linear_4bit(x, ids_apart, *args), routed_linear_4bit(x, ids, *args))
    check(x, stops, (weight, absmax, *nested), exact, lambda x, stops, *_: grouped_linear_4bit(x, apart, *args))


def test_a_stack_of_one_weight_is_that_weight(device):
    tensors, _ = stack("nf4", 64, False, device, e=1)
    x = torch.randn(2, K, device=device).half()
    stops = torch.tensor([2], dtype=torch.int32, device=device)
    weight, absmax, *nested = tensors
    each = [linear_4bit(x[i : i + 1], weight[0], absmax[0], None, *nested, "nf4", 64) for i in range(2)]
    assert torch.equal(grouped_linear_4bit(x, stops, weight, absmax, None, *nested, "nf4", 64), torch.cat(each))


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"x": torch.zeros(S, K + 32).half()}, "in_features", id="width"),
        pytest.param({"stops": torch.zeros(E, dtype=torch.int64)}, "stops is torch.int64", id="dtype of stops"),
        pytest.param(
            {"stops": torch.zeros(E - 1, dtype=torch.int32)}, "expected torch.int32 .4.", id="number of stops"
        ),
        pytest.param({"x": torch.zeros(1, S, K).half()}, r"expected \[S, K\]", id="dimensions"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change, message):
    (weight, absmax, *nested), _ = stack("nf4", 64, False, "cpu")
    given = {"x": torch.zeros(S, K).half(), "stops": torch.zeros(E, dtype=torch.int32)} | change
    with pytest.raises(RuntimeError, match=message):
        grouped_linear_4bit(given["x"], given["stops"], weight, absmax, None, *nested, "nf4", 64, K)


def test_every_reference_row_is_that_of_the_reference_linear(device):
    tensors, exact = stack("nf4", 64, True, device)
    x = torch.randn(S, K, device=device)
    stops = STOPS["rows behind the last"]
    weight, absmax, *nested = tensors
    got = reference.grouped_linear_4bit(
        x, torch.tensor(stops, dtype=torch.int32, device=device), weight, absmax, None, *nested, "nf4", 64, K
    )
    assert_within_budget(got, row_by_row(x.double(), exact, stops), row_by_row(x, exact, stops))


@pytest.mark.parametrize("e, n", [(0, 4), (3, 0)], ids=["no-weights", "no-outputs"])
def test_an_empty_stack_gives_zeros(e, n, device):
    x = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
    codes, absmax = torch.zeros(e, n, 32, dtype=torch.uint8, device=device), torch.ones(e, n, 1, device=device)
    state = (codes, absmax, torch.ones(e, n, device=device), None, None, "nf4", 64)
    ids = torch.zeros(4, dtype=torch.int32, device=device)
    assert torch.equal(routed_linear_4bit(x, ids, *state), x.new_zeros(4, n))
    stops = torch.full((e,), 2, dtype=torch.int32, device=device)
    assert torch.equal(grouped_linear_4bit(x, stops, *state), x.new_zeros(2, n))
