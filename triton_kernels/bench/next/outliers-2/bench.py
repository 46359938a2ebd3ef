"""compile: run each job of a share once. time: run all and print tables. Old tree as bigq_kernels_old."""
import json, os, sys, time, traceback
from dataclasses import replace
from functools import lru_cache, partial

import torch

from bigq_kernels.int8.choose import Int8Config, choose
from bigq_kernels.int8.linear import linear_int8 as new
from bigq_kernels.int8.quantize import quantize_int8
from bigq_kernels.int8.tokens import quantize_tokens
from bigq_kernels.int8.planes import quantize_planes
from bigq_kernels_old.int8.linear import linear_int8 as old
from bigq_kernels_old.int8.tokens import quantize_tokens as old_quantize_tokens

OUT = os.environ["OUT"] + "/" + os.environ["NAME_K"]
DEV = "cpu" if os.environ.get("TINY") else "cuda"
TINY = DEV == "cpu"
LOOK = os.environ.get("LOOK")
B = torch.float16 if TINY else torch.bfloat16  # the interpreter multiplies bits of bfloat16
SHAPES = [(14336, 4096), (28672, 8192), (4096, 4096), (4096, 14336)]
TOKENS = [1, 16, 64, 256, 512, 4096]
COLUMNS = [0, 1, 6, 41, 200]
if TINY:
    SHAPES, TOKENS, COLUMNS = [(64, 256)], [1, 16, 20, 130], [0, 1, 6, 41]


def C(bm, bn, bk, s, w=4, pf=0, split=1, sps=0):
    return Int8Config(block_m=bm, block_n=bn, block_k=bk, stages=s, warps=w, prefetches=pf, split=split, steps_per_split=sps)


def jobs():
    """(table, shape, m, row name, function of (x, w, a), threshold, columns)"""
    out = []
    for n, k in SHAPES:
        for m in TOKENS:
            if m == 4096 and n != 14336 and not TINY:
                continue
            rows = [("old t0", partial(old), 0.0, (0,)), ("old", partial(old), 6.0, COLUMNS)]
            choice = lambda way: replace(choose(torch.device(DEV), m, n, k, B, True), way=way)
            if m > 1 and n == 14336:
                rows.append(("new t0", partial(new), 0.0, (0,)))
            if m <= 512:
                rows.append(("new tiles", partial(new, choice=choice("tiles")), 6.0, COLUMNS))
            if m > 64 or TINY:
                rows.append(("new gather", partial(new, choice=choice("gather")), 6.0, COLUMNS))
            for name, f, t, cols in rows:
                out += [("main", (n, k), m, name, f, t, c) for c in cols]
    sweeps = []
    if LOOK:
        out = [j for j in out if j[1] == (14336, 4096) and j[2] in (16, 64, 256, 512) and j[6] in (0, 1, 6) and j[3] in ("new tiles", "new gather")]
    elif not TINY:
        sweeps += [((28672, 8192), 16, [C(16, 64, 256, 3, pf=2), C(16, 64, 256, 2, pf=2), C(16, 128, 256, 2, pf=2), C(16, 64, 512, 2, pf=2),
                                        C(16, 32, 512, 3, pf=2), C(16, 64, 256, 2, 8, pf=2), C(16, 64, 256, 3, pf=1), C(16, 64, 256, 3)]),
                   ((28672, 8192), 64, [C(64, 128, 128, 4, pf=2), C(64, 128, 128, 3, pf=2), C(64, 128, 128, 3, 8, pf=2), C(64, 128, 256, 2, pf=2),
                                        C(64, 256, 128, 4, 8, pf=2), C(64, 128, 128, 3), C(64, 64, 256, 2, pf=2)]),
                   ((28672, 8192), 1, [C(16, 64, 256, 3, pf=2), C(16, 64, 256, 3), C(16, 64, 512, 2, pf=2), C(16, 64, 256, 2, pf=4)]),
                   ((14336, 4096), 16, [C(16, 64, 256, 4, pf=2), C(16, 64, 256, 3, pf=2), C(16, 64, 128, 5, pf=2), C(16, 64, 256, 4, pf=4)]),
                   ((14336, 4096), 64, [C(64, 64, 128, 4, pf=2), C(64, 64, 128, 4, 8, pf=2), C(64, 64, 256, 2, pf=2), C(64, 64, 128, 4, pf=4)]),
                   ((14336, 4096), 256, [C(128, 128, 128, 3), C(128, 128, 128, 3, 8)]),
                   ((14336, 4096), 512, [C(128, 128, 128, 3), C(128, 128, 128, 3, 8)])]
    else:
        sweeps += [((64, 256), 16, [C(16, 32, 128, 2)])]
    for shape, m, configs in sweeps:
        for c in configs:
            name = f"{c.block_m}x{c.block_n}x{c.block_k} s{c.stages} w{c.warps} p{c.prefetches}"
            ways = ["codes", "planes", "tiles"] if m == 1 else ["codes", "tiles", "gather"] if m > 64 else ["codes", "tiles"]
            for way in ways:
                ch = replace(choose(torch.device(DEV), m, *shape, B, True), way=way, config=c)
                for col in ((0,) if way == "codes" else (1, 6)):
                    out.append(("sweep", shape, m, f"{name} {way}", partial(new, choice=ch), 0.0 if way == "codes" else 6.0, col))
    return out


@lru_cache(maxsize=1)
def weights(n, k, count):
    torch.manual_seed(0)
    return [quantize_int8(torch.randn(n, k, device=DEV, dtype=B)) for _ in range(count)]


@lru_cache(maxsize=8)
def inputs(m, k, columns):
    torch.manual_seed(m + columns)
    x = torch.randn(m, k, device=DEV, dtype=B).clamp(-5, 5)
    return x.index_fill(1, torch.randperm(k, device=DEV)[:columns], 8.0)


def readings(calls, repeats):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        e0, e1 = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        e0.record(); graph.replay(); e1.record(); torch.cuda.synchronize()
        times.append(e0.elapsed_time(e1) * 1e3 / len(calls))
    times = sorted(times[3:])
    return times[len(times) // 2]


def quantizers():
    out = []
    for m, k in ((16, 4096), (64, 4096), (256, 4096), (512, 4096), (16, 8192), (64, 8192), (16, 14336), (4096, 4096)):
        for c in (0, 6):
            out += [("quantize", (m, k), m, "old", lambda x: old_quantize_tokens(x, 6.0, None, True), c),
                    ("quantize", (m, k), m, "new", lambda x: quantize_tokens(x, 6.0, None, True), c)]
            if m <= 16:
                out.append(("quantize", (m, k), m, "planes", lambda x: quantize_planes(x, 6.0, False, None, True), c))
        out += [("quantize", (m, k), m, "old t0", lambda x: old_quantize_tokens(x, 0.0, None, True), 0)]
    return [] if TINY or LOOK else out


def compile_share(i, n):
    t0 = time.time()
    unique = {}
    for j in jobs():
        unique[j[1:4]] = j
    for table, (N, K), m, name, f, t, c in list(unique.values())[i::n]:
        try:
            f(inputs(m, K, c), *weights(N, K, 1)[0], None, t)
        except Exception:
            print("FAIL", N, K, m, name, c, traceback.format_exc()[-400:], flush=True)
    for table, (m, k), _, name, f, c in [q for q in quantizers() if q[-1] == 0][i::n]:
        f(inputs(m, k, c))
    if DEV == "cuda":
        torch.cuda.synchronize()
    print(f"compiled share {i} in {time.time() - t0:.1f} s", flush=True)


def stress():
    """Chains of different inputs in one graph, in both ways, replayed: each output as its eager one, bit for bit."""
    for m, n, k in ((64, 14336, 4096), (256, 14336, 4096), (512, 4096, 4096), (16, 4096, 14336), (300, 1000, 4096)):
        (w, a), = weights(n, k, 1)
        cases, wants = [], []
        for way in ("tiles", "gather"):
            for c in (0, 1, 6, 41, 200):
                x = inputs(m, k, c).clone()
                ch = replace(choose(x.device, m, n, k, B, True), way=way)
                torch.cuda.synchronize()
                wants.append(new(x, w, a, None, 6.0, choice=ch).clone())
                torch.cuda.synchronize()
                cases.append((x, ch))
        ways = [torch.equal(p, q) for p, q in zip(wants[:5], wants[5:])]
        new(cases[0][0], w, a, None, 6.0, choice=cases[0][1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [new(x, w, a, None, 6.0, choice=ch) for x, ch in cases * 2]
        bad = 0
        for _ in range(100):
            for o in outs:
                o.fill_(7)
            graph.replay()
            torch.cuda.synchronize()
            bad += sum(not torch.equal(o, e) for o, e in zip(outs, wants * 2))
        print("stress", m, n, k, "bad", bad, "of", 100 * len(outs), "ways equal", ways, flush=True)


def main():
    t0, rows = time.time(), []
    if DEV == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    deadline = t0 + float(os.environ.get("LIMIT", 70))
    todo = jobs()
    todo.sort(key=lambda j: (SHAPES.index(j[1]),))
    if not TINY and not LOOK:
        for table, (m, k), _, name, f, c in quantizers():
            x = inputs(m, k, c)
            rows.append((table, f"{m}x{k}", m, name, c, readings([partial(f, x)] * 8, 15)))
        weights.cache_clear()
        stress()
    for table, (N, K), m, name, f, t, c in todo:
        if time.time() > deadline:
            print("out of time at", N, K, m, name, c); break
        x = inputs(m, K, c)
        try:
            count = 1 if TINY else max(3, int(200e6 // (N * K)) + 1)
            ws = weights(N, K, count)
            if TINY or (table == "main" and t > 0):
                want = old(x, *ws[0], None, t)
                got = f(x, *ws[0], None, t)
                err = ((got.float() - want.float()).norm() / want.float().norm()).item()
                assert err < 4e-3, err
            us = 0.0 if TINY else readings([partial(f, x, w, a, None, t) for w, a in ws], 9 if m == 4096 else 15)
            rows.append((table, f"{N}x{K}", m, name, c, us))
        except Exception as e:
            print("FAIL", N, K, m, name, c, repr(e)[:300], flush=True)
    json.dump(rows, open(f"{OUT}/rows{LOOK or str()}.json", "w"))
    last = None
    for table in ("quantize", "main", "sweep"):
        seen = {}
        for tb, shape, m, name, c, us in rows:
            if tb == table:
                seen.setdefault((shape, m, name), {})[c] = us
        for (shape, m, name), times in seen.items():
            if (table, shape, m) != last:
                last = (table, shape, m)
                print("--", *last)
            print(f"{name:32s}", "  ".join(f"{c}: {us:.1f}" for c, us in times.items()), flush=True)
    print(f"timed in {time.time() - t0:.1f} s", flush=True)


if __name__ == "__main__":
    compile_share(int(sys.argv[2]), int(sys.argv[3])) if sys.argv[1] == "compile" else main()
