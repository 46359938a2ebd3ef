"""Dozens to hundreds of tokens times a 4-bit weight by Hopper's wgmma, where no warp waits for another, in Gluon.

As in `wgmma`, weights are decoded into registers while the tensor cores multiply by the ones before. Here

- a bulk copy brings the tokens of a slice of 64 elements of K (`token_stages`), in tiles of which a row's pieces of 16
  bytes lie as the tensor cores read them;
- each warp copies the codes of its own 16 rows (`rings`) and their scales (`scale_ring`). So it waits for no other
  warp, and one warp group decodes while the other multiplies. Double quantization is undone by a launch before;
- the table has twice the room for an entry, which saves an instruction for each byte of codes.

256 tokens of 14336 x 4096 take 46.0 us so, and 53.0 by a form of `wgmma` for linears (H200). With 64 tokens or fewer a
warp's own decoding is the bound. Tiles of these leave registers for twice the warps, which share K: the first half of
the warps has every second step, the other half the rest, and their sums are added at the end.

Gluon has no interpreter, so values are tested on a GPU only.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from bigq_kernels.block4.absmax import dequantize_absmax
from bigq_kernels.block4.bulk_config import BLOCK_N
from bigq_kernels.block4.configs import BulkConfig
from bigq_kernels.block4.gluon.groups import place_of_program
from bigq_kernels.block4.gluon.loops import loop_sizes, power_of_2, rest_of, wgmma_sums
from bigq_kernels.block4.gluon.operands import decode_weights
from bigq_kernels.block4.gluon.rings import (
    STAGE_NBYTES,
    commit_copies,
    copy_pieces,
    place_in_ring,
    read_codes,
    shared_address,
    wait_for_copies,
)
from bigq_kernels.block4.gluon.scale_ring import copy_scales, place_in_scales, read_scales
from bigq_kernels.block4.gluon.scales import add_tile_splits, barrier, reinterpret
from bigq_kernels.block4.gluon.slices import copy_layout, lane_layout, quarter_layout
from bigq_kernels.block4.gluon.table import GAP, WIDE_ENTRY, WIDE_NBYTES, code_tables, fill_wide_table, lane_bank
from bigq_kernels.block4.gluon.token_stages import (
    copy_tokens,
    half_of_warp,
    init_stages,
    release_tokens,
    wait_for_tokens,
)
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.tokens import tile_tokens
from bigq_kernels.groups import group_tokens, most_tiles
from bigq_kernels.launch import launch
from bigq_kernels.split_k import even_splits, split_workspace
from bigq_kernels.tiles import ceil_div

__all__ = ["linear_4bit_bulk"]

WARPS = BLOCK_N // 16  # of a half: each has 16 rows
STEP_BYTES = gl.constexpr(128)  # of a row in one stage of codes: 256 elements of K, four slices of 64
RING = gl.constexpr(2)  # stages of codes: a step is copied while the one before is decoded
SLICE_NBYTES = gl.constexpr(128)  # of a token
BARRIER_GAP = gl.constexpr(255)  # of the table; the scales are in the first gaps, see `scale_ring`


@gluon.constexpr_function
def _slice_place(number, halves):
    """How many slices of K lie between the first one of a half and another: its steps are `halves` apart."""
    return number // 4 * (4 * halves) + number % 4


@gluon.jit
def _copy_step(step, at, stop, copies, PAIRS, B, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr):
    """Start the copies of a step's codes and scales, or of nothing behind the last step. copies: see the kernel.

    at: the number of steps that the warp has before it.
    """
    ring, first_piece, byte, scale_places, scale_row, part, absmax = copies
    if step < stop:
        stage = at % RING
        nbytes = gl.full(byte.shape, 16, gl.int32, byte.type.layout)
        if not EVEN:
            nbytes = gl.where(byte + step * STEP_BYTES < PAIRS, 16, 0)
        copy_pieces(ring + stage * STAGE_NBYTES, first_piece + step * STEP_BYTES, nbytes)
        copy_scales(scale_places, scale_row, step, stage, part, absmax, B, BLOCK_SIZE, EVEN)
    commit_copies(step)


@gluon.jit
def _products(
    tile_of, start, stop, DTYPE: gl.constexpr, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The sums over steps from start to stop of a tile of the weight and SIZE tokens, in one or two parts.

    tile_of: where the tile's operands are. The first step of codes and scales is on its way. Of two halves, a warp has
    the sums over every second step, and rows from BLOCK_N on are those of the second half. Behind K, tokens and codes
    are 0, and are multiplied: under a condition a product waits for the one before, 794 instead of 427 us for 2048 rows
    of 32 weights with K = 2880 (H200).
    """
    (
        x_ptr, x_smem, memory, bars, copies, codes_at, scale_places, table, bank, PAIRS, B, half,
    ) = tile_of  # fmt: skip
    FIRST: gl.constexpr = power_of_2(SIZE)
    REST: gl.constexpr = SIZE - FIRST
    SUMS: gl.constexpr = wgmma_sums(FIRST, gl.num_warps())
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    NBYTES: gl.constexpr = SIZE * SLICE_NBYTES
    X_STAGE: gl.constexpr = BLOCK_M * SLICE_NBYTES
    UNROLL: gl.constexpr = STAGES // 4  # steps, so that each slice of the loop has a stage of its own
    ROWS: gl.constexpr = BLOCK_N * HALVES
    # The loop runs at least once. Otherwise a second path initializes the sums, and ptxas serializes every product.
    own_steps = gl.maximum((stop - start + (HALVES - 1)) // HALVES, 1)
    own = own_steps * 4
    source = x_ptr.to(gl.int64) + start.to(gl.int64) * (4 * X_STAGE)
    copy_tokens(bars, memory, source, gl.minimum(own, STAGES), (HALVES - 1) * 4 * X_STAGE, NBYTES, X_STAGE)
    total = gl.full([ROWS, FIRST], 0.0, gl.float32, SUMS)
    if REST > 0:
        REST_SUMS: gl.constexpr = wgmma_sums(REST, gl.num_warps())
        rest = gl.full([ROWS, REST], 0.0, gl.float32, REST_SUMS)
    before = gl.full([ROWS, 64], 0.0, DTYPE, W_OPERAND)
    for first in range(0, own_steps, UNROLL):
        parity = first // UNROLL & 1
        for u in gl.static_range(UNROLL):
            at = first + u
            if u == 0 or at < own_steps:
                step = start + at * HALVES
                ring_stage = at % RING
                wait_for_copies(RING - 2, step)
                _copy_step(step + (RING - 1) * HALVES, at + RING - 1, stop, copies, PAIRS, B, BLOCK_SIZE, EVEN)
                scales = read_scales(scale_places, ring_stage)
                for i in gl.static_range(4):
                    words = read_codes(codes_at[i] + ring_stage * STAGE_NBYTES)
                    w = decode_weights(words, scales[i], table, bank, DTYPE, W_OPERAND, True)
                    wait_for_tokens(bars, parity, u * 4 + i)
                    x = x_smem.index(half * STAGES + (u * 4 + i))
                    total = warpgroup_mma(w, x.slice(0, FIRST).permute((1, 0)), total, is_async=True)
                    # Wait for the products of the slice before, which read `before`.
                    if REST > 0:
                        w_rest = gl.convert_layout(w, gl.DotOperandLayout(0, REST_SUMS, 2), assert_trivial=True)
                        rest = warpgroup_mma(w_rest, x.slice(FIRST, REST).permute((1, 0)), rest, is_async=True)
                        total, rest, _ = warpgroup_mma_wait(2, deps=[total, rest, before])
                    else:
                        total, _ = warpgroup_mma_wait(1, deps=[total, before])
                    before = w
                    done = at * 4 + i
                    ahead = source + _slice_place(u * 4 + i + STAGES - 2, HALVES) * X_STAGE
                    release_tokens(
                        bars, memory, ahead, parity, done > 0,
                        (done >= 2) & (done - 2 + STAGES < own), u * 4 + i, STAGES, NBYTES, X_STAGE,
                    )  # fmt: skip
        source += STAGES * HALVES * X_STAGE
    if REST > 0:
        return warpgroup_mma_wait(0, deps=[total, rest])
    else:
        total = warpgroup_mma_wait(0, deps=[total])
        return total, total


@gluon.jit
def _matrix_in(x_smem, DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """A matrix at the beginning of all memory, which Triton 3.8 takes for another kind of tiles as a whole only."""
    BITS: gl.constexpr = x_smem.shape[0] * x_smem.shape[1] * x_smem.shape[2] * x_smem.dtype.primitive_bitwidth
    COUNT: gl.constexpr = BITS // (ROWS * COLUMNS * DTYPE.primitive_bitwidth)
    gl.static_assert(COUNT * ROWS * COLUMNS * DTYPE.primitive_bitwidth == BITS)
    return reinterpret(x_smem, DTYPE, [COUNT, ROWS, COLUMNS], LAYOUT).index(0)


@gluon.jit
def _add_halves(total, x_smem):
    """The sums [N, tokens] of both halves [2 * N, tokens], through the memory of tokens."""
    N: gl.constexpr = total.shape[0] // 2
    TOKENS: gl.constexpr = total.shape[1]
    # Units of 32 bytes are swapped by the row, so that the writes and reads of neighbouring rows meet no bank twice.
    UNITS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8 if TOKENS >= 64 else 4, order=[1, 0])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps() // 2, 2], instr_shape=[16, TOKENS // 2, 16]
    )
    sums = _matrix_in(x_smem, gl.float32, 2 * N, TOKENS, UNITS)
    sums.store(total)
    barrier()
    total = sums.slice(0, N).load(SUMS) + sums.slice(N, N).load(SUMS)
    barrier()  # the output is stored there next
    return total


@gluon.jit
def _store(total, x_smem, bias_ptr, out_ptr, first_m, first_n, M, N):
    """Store sums [BLOCK_N, tokens] plus bias to the rows from first_m of out [M, N], through the memory of tokens."""
    SUMS: gl.constexpr = total.type.layout
    BLOCK_N: gl.constexpr = total.shape[0]
    if bias_ptr is not None:
        n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
        total += bias.to(gl.float32)[:, None]
    # Triton has a warp wait where memory is stored to that another one may still load from.
    if total.shape[1] == 256:  # of 224 KiB the 64 of 256 tokens are no whole part
        first, second = gl.split(total.reshape([BLOCK_N, 2, 128]).permute((0, 2, 1)))
        _store_rows(first, x_smem, out_ptr, first_m, first_n, M, N)
        _store_rows(second, x_smem, out_ptr, first_m + 128, first_n, M, N)
    else:
        _store_rows(total, x_smem, out_ptr, first_m, first_n, M, N)


@gluon.jit
def _store_rows(total, x_smem, out_ptr, first_m, first_n, M, N):
    """Store sums [BLOCK_N, tokens] to the rows from first_m of out [M, N], through the memory of tokens."""
    BLOCK_N: gl.constexpr = total.shape[0]
    TOKENS: gl.constexpr = total.shape[1]
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 16, order=[1, 0])
    rows = _matrix_in(x_smem, out_ptr.dtype.element_ty, TOKENS, BLOCK_N, ROWS)
    rows.store(total.to(out_ptr.dtype.element_ty).permute((1, 0)))
    barrier()
    out = rows.load(OUT)  # 16 bytes of an output row a store
    m = gl.arange(0, TOKENS, gl.SliceLayout(1, OUT))[:, None]
    n = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUT)))[None, :]
    gl.store(out_ptr + first_m * N + (m.to(gl.int64) * N + n), out, mask=(first_m + m < M) & (n < N))


@gluon.jit
def _multiply(
    tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """The `_products` of a tile, the sum of splits, and the output. place: of the tile, see the kernel."""
    tile, split, first_m, first_n, M, N, start, stop = place
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    total, rest = _products(tile_of, start, stop, DTYPE, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SIZE, STAGES, HALVES)
    barrier()  # what follows writes where slow warps still read
    if HALVES == 2:
        gl.static_assert(rest.shape[1] == total.shape[1])  # one part
        total = _add_halves(total, tile_of[1])
    FIRST: gl.constexpr = total.shape[1]
    is_last = True
    if SPLIT > 1:
        total, is_last = add_tile_splits(total, tile, split, first_m, M, partial_ptr, count_ptr, BLOCK_M, SPLIT)
    if is_last:
        x_smem = tile_of[1]
        _store(total, x_smem, bias_ptr, out_ptr, first_m, first_n, M, N)
        if SIZE > FIRST:
            _store(rest, x_smem, bias_ptr, out_ptr, first_m + FIRST, first_n, M, N)


@gluon.jit
def _multiply_least(
    rows, SIZES: gl.constexpr, tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """`_multiply` with the least of SIZES that holds `rows`, or with the last.

    Branches in a row instead of nested ones take ptxas 60 registers more, and make it serialize products.
    """
    if len(SIZES) == 1:  # noqa: SIM114, for this is decided when it is compiled
        _multiply(
            tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SPLIT,
            SIZES[0], STAGES, HALVES,
        )  # fmt: skip
    elif rows <= SIZES[0]:
        _multiply(
            tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SPLIT,
            SIZES[0], STAGES, HALVES,
        )  # fmt: skip
    else:
        _multiply_least(
            rows, rest_of(SIZES), tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE, EVEN,
            BLOCK_M, BLOCK_N, SPLIT, STAGES, HALVES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "steps_per_split"])  # a new number of tokens compiles nothing
def _linear_4bit_bulk_kernel(
    x_ptr,  # [cdiv(M, BLOCK_M), 4 * steps, BLOCK_M, 64] of `tile_tokens` with swapped pieces, the kernel before
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32
    bias_ptr,  # [N] or None
    partial_ptr,  # [tiles, SPLIT, BLOCK_N, BLOCK_M] float32
    count_ptr,  # [tiles] int32, zero once the kernel before has ended: how many programs have finished the tile
    out_ptr,  # [M, N]
    groups_ptr,  # of `group_tokens` for a stack of weights, or None
    M,
    N,
    PAIRS,
    B,
    steps_per_split,
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks
    NEW_SCALES: gl.constexpr,  # a launch of this linear wrote the scales, so they are copied after a wait
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
    LEAST_M: gl.constexpr,  # tokens of the smallest loop: a tile of fewer than BLOCK_M takes the least that holds them
    STAGES: gl.constexpr,  # of tokens, for each half: 4 or 8
    HALVES: gl.constexpr,  # of the warps, which share the steps of K
):  # fmt: skip
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    # One allocation, of which the kernel knows where it lies: stages of tokens, the table, and rings of codes.
    X_STAGE: gl.constexpr = BLOCK_M * SLICE_NBYTES
    ALL_NBYTES: gl.constexpr = HALVES * STAGES * X_STAGE + WIDE_NBYTES + WARPS * RING * STAGE_NBYTES
    ALL_STAGES: gl.constexpr = (ALL_NBYTES + X_STAGE - 1) // X_STAGE
    x_smem = gl.allocate_shared_memory(DTYPE, [ALL_STAGES, BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    memory = shared_address(t0)
    table = memory + HALVES * STAGES * X_STAGE
    rings = table + WIDE_NBYTES
    half = half_of_warp(t0) if HALVES == 2 else 0
    bars = table + (BARRIER_GAP * WIDE_ENTRY + GAP) - half * WIDE_ENTRY
    bank = lane_bank(t0)

    tile, m_tile, first_m, first_n, weight, M = place_of_program(groups_ptr, M, N, BLOCK_M, BLOCK_N)
    first_row = weight * N + first_n
    if groups_ptr is not None:
        if first_m >= M:
            return
        if bias_ptr is not None:
            bias_ptr += weight * N
    init_stages(bars, STAGES, WARPS // HALVES)
    split = gl.program_id(1)
    last_row = N - 1 - first_n  # rows past N read the last row; their result is not stored
    COPY: gl.constexpr = copy_layout(WARPS)
    ROWS: gl.constexpr = BLOCK_N * HALVES
    piece_row = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))[:, None]
    byte = gl.arange(0, 8, gl.SliceLayout(0, COPY))[None, :] * 16 + piece_row * 0
    first_piece = weight_ptr + first_row * PAIRS + (gl.minimum(piece_row % BLOCK_N, last_row) * PAIRS + byte)
    LANES: gl.constexpr = lane_layout(WARPS)
    lane_row = gl.arange(0, ROWS, gl.SliceLayout(1, LANES))[:, None]
    part = gl.arange(0, 4, gl.SliceLayout(0, LANES))[None, :]
    absmax = absmax_ptr + first_row * B
    copies = (
        rings + place_in_ring(0, piece_row, byte, RING), first_piece, byte,
        place_in_scales(table, lane_row, RING), gl.minimum(lane_row % BLOCK_N, last_row), part, absmax,
    )  # fmt: skip
    start = split * steps_per_split
    stop = gl.minimum(start + steps_per_split, gl.cdiv(PAIRS, STEP_BYTES))
    start += half
    if not NEW_SCALES:
        _copy_step(start, 0, stop, copies, PAIRS, B, BLOCK_SIZE, EVEN)
    fill_wide_table(table, t0, t1, t2, t3, t4, t5, t6, t7)
    if NEW_SCALES:
        gdc_wait()  # for the kernels before, one of which wrote the scales
        _copy_step(start, 0, stop, copies, PAIRS, B, BLOCK_SIZE, EVEN)
    barrier()
    if groups_ptr is None:
        gdc_wait()  # for the tokens, and the counts

    READ: gl.constexpr = quarter_layout(WARPS)
    read_row = gl.arange(0, ROWS, gl.SliceLayout(1, READ))
    read_byte = gl.arange(0, 32, gl.SliceLayout(0, READ))[None, :]
    codes_at = (
        rings + place_in_ring(0, read_row[:, None], read_byte, RING),
        rings + place_in_ring(0, read_row[:, None], read_byte + 32, RING),
        rings + place_in_ring(0, read_row[:, None], read_byte + 64, RING),
        rings + place_in_ring(0, read_row[:, None], read_byte + 96, RING),
    )
    scale_places = place_in_scales(table, read_row, RING)
    width = gl.cdiv(PAIRS, STEP_BYTES) * (STEP_BYTES * 2)
    x_ptr += m_tile * width.to(gl.int64) * BLOCK_M
    tile_of = (
        x_ptr, x_smem, memory + half * (STAGES * X_STAGE), bars, copies, codes_at, scale_places,
        table, bank, PAIRS, B, half,
    )  # fmt: skip
    place = tile, split, first_m, first_n, M, N, start, stop
    _multiply_least(
        M - first_m, loop_sizes(BLOCK_M, LEAST_M, SPLIT), tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr,
        BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SPLIT, STAGES, HALVES,
    )  # fmt: skip


def linear_4bit_bulk(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: BulkConfig, stops: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    K % 64 == 0, block_size >= 64, x and weight aligned to 16 bytes; any M. With `stops`, packed is [E, N, K/2] and
    bias [E, N], and each weight multiplies its rows of x.
    """
    absmax, (nested_absmax, nested_offset, _) = packed.absmax, packed.nested
    if nested_absmax is not None and nested_offset is not None:
        # To decode scales beside their codes took 24 of 105 us at 64 tokens of 28672 x 8192 (H200).
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    m, _ = x.shape
    n, pairs = packed.weight.shape[-2:]
    m_tiles = ceil_div(m, config.block_m) if stops is None else most_tiles(m, len(packed.weight), config.block_m)
    tiles = ceil_div(n, BLOCK_N) * m_tiles
    steps = ceil_div(pairs, STEP_BYTES.value)
    halves = min(config.halves, steps)  # one step has no second half
    steps_per_split, split = even_splits(steps, config.split, least=halves)
    partial, count = split_workspace(tiles, split, config.block_m * BLOCK_N, x.device)
    groups = None
    if stops is not None:
        groups = group_tokens(stops, len(packed.weight), config.block_m, count, out)
    x_tiles = tile_tokens(x, config.block_m, steps * 2 * STEP_BYTES.value, count, groups, swapped=True)
    launch(
        _linear_4bit_bulk_kernel, (tiles, split),
        x_tiles, packed.weight, absmax, bias, partial, count, out, groups,
        m, n, pairs, absmax.shape[-1], steps_per_split, *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0, NEW_SCALES=nested_absmax is not None,
        BLOCK_M=config.block_m, BLOCK_N=BLOCK_N, SPLIT=split,
        LEAST_M=config.block_m if stops is None else max(config.block_m // 4, 32),
        STAGES=config.stages, HALVES=halves,
        options={"num_warps": WARPS * halves, "launch_pdl": True},
    )  # fmt: skip
