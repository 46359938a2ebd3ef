"""Stages of tokens in shared memory: bulk copies fill them, warps read them, and barriers tell when, in Gluon.

A bulk copy is one instruction of one thread for all tokens of a slice. Copies of 16 bytes are 2048 for 256 tokens. A
bulk copy writes as the tensor cores read, so nothing has to be fenced. Each stage has two barriers: the bytes of a copy
complete a phase of the first, and the warps that have read the stage one of the second. No warp waits for another but
the one that fills a stage again, and these take turns: when it was always the first, its warp group was always late,
32.4 us instead of 30.8 for 128 tokens of 14336 x 4096 (H200). Each half of the warps may have stages of its own. Then
the first thread of a half is its thread 0.

Gluon starts bulk copies only by tensor descriptors, which are a host's call for each x. So these are PTX.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigq_kernels.block4.gluon.asm import run

__all__ = [
    "copy_tokens",
    "half_of_warp",
    "init_stages",
    "release_tokens",
    "wait_for_tokens",
]

MOST_STAGES = gl.constexpr(8)

HALF_ASM = gl.constexpr("mov.u32 $0, %tid.x;\nshr.u32 $0, $0, 8;")
# Thread 0 makes the barriers of $2 stages from $1 on, of which each is read by $3 warps.
INIT_ASM = gl.constexpr("""{
.reg .pred first, more; .reg .u32 thread, at, left;
mov.u32 thread, %tid.x;
and.b32 thread, thread, 255;
setp.eq.u32 first, thread, 0;
@!first bra after;
mov.u32 at, $1;
mov.u32 left, $2;
next:
mbarrier.init.shared::cta.b64 [at], 1;
mbarrier.init.shared::cta.b64 [at + 64], $3;
add.u32 at, at, 8;
sub.u32 left, left, 1;
setp.ne.u32 more, left, 0;
@more bra next;
fence.proxy.async.shared::cta;
after:
bar.warp.sync 0xffffffff;
mov.b32 $0, 0;
}""")
# Thread 0 starts $5 copies of $4 bytes from $3 on, in steps of $6 and after each fourth one of $7, to stages of $6
# bytes from $2 on. They complete a phase of the barriers from $1 on.
COPY_ASM = gl.constexpr("""{
.reg .pred first, more; .reg .u32 thread, bar, at, done, step; .reg .u64 from, far;
mov.u32 thread, %tid.x;
and.b32 thread, thread, 255;
setp.eq.u32 first, thread, 0;
@!first bra after;
mov.u32 bar, $1;
mov.u32 at, $2;
mov.u64 from, $3;
mov.u32 done, 0;
next:
mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], $4;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at], [from], $4, [bar];
add.u32 done, done, 1;
add.u32 bar, bar, 8;
add.u32 at, at, $6;
and.b32 step, done, 3;
setp.eq.u32 more, step, 0;
selp.b32 step, $7, $6, more;
cvt.u64.u32 far, step;
add.u64 from, from, far;
setp.lt.u32 more, done, $5;
@more bra next;
after:
bar.warp.sync 0xffffffff;
mov.b32 $0, 0;
}""")
WAIT_ASM = gl.constexpr("""{
.reg .pred done;
waits:
mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
@!done bra.uni waits;
mov.b32 $0, 0;
}""")
# A lane of each warp arrives at the barrier $1, if $2. If $5, thread $10 waits for phase $4 of the barrier $3, and
# copies $9 bytes from $8 to $7, with the barrier $6.
RELEASE_ASM = gl.constexpr("""{
.reg .pred arrives, refills, done; .reg .u32 thread, lane;
mov.u32 thread, %tid.x;
and.b32 lane, thread, 31;
and.b32 thread, thread, 255;
setp.eq.u32 arrives, lane, 0;
setp.ne.and.u32 arrives, $2, 0, arrives;
@arrives mbarrier.arrive.shared::cta.b64 _, [$1];
setp.eq.u32 refills, thread, $10;
setp.ne.and.u32 refills, $5, 0, refills;
@!refills bra after;
waits:
mbarrier.try_wait.parity.shared::cta.b64 done, [$3], $4;
@!done bra waits;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [$6], $9;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$7], [$8], $9, [$6];
after:
bar.warp.sync 0xffffffff;
mov.b32 $0, 0;
}""")


@gluon.constexpr_function
def _full(stage):
    """The place of the barrier that a stage's copy completes."""
    return stage * 8


@gluon.constexpr_function
def _read(stage):
    """The place of the barrier at which warps arrive that have read a stage."""
    return (MOST_STAGES.value + stage) * 8


@gluon.jit
def half_of_warp(anything):
    """0 in the first 8 warps, 1 in the next ones: a scalar that differs. anything: an int32 scalar."""
    return run(HALF_ASM, "=r,r", [anything])


@gluon.jit
def init_stages(bars, STAGES: gl.constexpr, WARPS: gl.constexpr):
    """Make the barriers from the address `bars` on, 128 bytes, for WARPS that read each stage.

    They may be used after a `barrier`. Each half of the warps has its own.
    """
    gl.static_assert(STAGES <= MOST_STAGES)
    run(INIT_ASM, "=r,r,r,r", [bars, STAGES, WARPS])


@gluon.jit
def copy_tokens(bars, memory, source, count, GAP: gl.constexpr, NBYTES: gl.constexpr, STAGE_NBYTES: gl.constexpr):
    """Start the first copies to `count` stages, of NBYTES each. A loop, since code runs cold: 8 copies are 150 lines.

    source: the address, int64, of the first slice. Four follow each other, and GAP bytes lie between the fourth and the
    next one. memory: where stage 0 lies.
    """
    run(
        COPY_ASM,
        "=r,r,r,l,r,r,r,r",
        [bars, memory, source, NBYTES, count, STAGE_NBYTES, STAGE_NBYTES + GAP],
    )


@gluon.jit
def wait_for_tokens(bars, parity, STAGE: gl.constexpr):
    """Wait for the copy to a stage. parity: of the number of copies to it before."""
    run(WAIT_ASM, "=r,r,r", [bars + _full(STAGE), parity])


@gluon.jit
def release_tokens(
    bars, memory, source, parity, is_read, refills, STAGE: gl.constexpr, STAGES: gl.constexpr, NBYTES: gl.constexpr,
    STAGE_NBYTES: gl.constexpr,
):  # fmt: skip
    """After the stage before STAGE has been read, if is_read: say so. If `refills`, fill the one before that again.

    That one has been read by all warps but slow ones, for which a thread waits. parity: of the number of copies to
    STAGE before the last. source: of the copy, as in `copy_tokens`.
    """
    BEFORE: gl.constexpr = (STAGE + STAGES - 1) % STAGES
    REFILLED: gl.constexpr = (STAGE + STAGES - 2) % STAGES
    read_parity = parity if STAGE >= 2 else parity ^ 1
    run(
        RELEASE_ASM,
        "=r,r,r,r,r,r,r,r,l,r,r",
        [
            bars + _read(BEFORE), is_read.to(gl.int32), bars + _read(REFILLED), read_parity, refills.to(gl.int32),
            bars + _full(REFILLED), memory + REFILLED * STAGE_NBYTES, source, NBYTES, STAGE * (256 // STAGES),
        ],
    )  # fmt: skip
