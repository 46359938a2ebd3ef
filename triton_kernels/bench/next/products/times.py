"""warm I N | linears | stacks: times of the ways and of candidates, as JSON lines."""
import json, sys, time
import torch
from dataclasses import replace
from bigq_kernels.block4.choose import choose
from bigq_kernels.block4.choose_grouped import choose_grouped, takes_rows
from bigq_kernels.block4.configs import WGMMA, WgmmaConfig, bulk_config, shape_class
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.linear import launcher
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.gate import gated
from bigq_kernels.groups import weights_of_rows
from bigq_kernels.tiles import next_power_of_2
from bigq_kernels.timing import copies, microseconds
DEV, BF = "cuda", torch.bfloat16
SHAPES = [(14336, 4096), (4096, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (2048, 4096)]
TOKENS = [16, 32, 64, 128, 256, 512, 4096]
MODELS = {"qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "gptoss": (32, 4, 2880, 2880)}
def weight(n, k, e=None):
    rows, lead = n * (e or 1), (e, n) if e else (n,)
    w = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, device=DEV)
    return Packed4(w, torch.rand(*lead, k // 64, device=DEV) * 0.02 + 0.01, (None, None, None), "nf4", 64)
def old_row(m, n, k):
    row = WGMMA[9, 0].get(shape_class(n, k), {}).get(next_power_of_2(m))
    return None if row is None else WgmmaConfig(block_m=row[0], block_n=row[1], split=row[2], warps=row[3], registers=row[4])
def candidates(m, n, k):
    for tile, splits in ((32, (1, 2, 4)), (64, (1, 2, 4, 8)), (128, (1, 2, 4, 8)), (256, (1, 2))):
        if tile > max(32, 2 * next_power_of_2(m)) or tile * 4 < m: continue
        for split in splits:
            programs = -(-n // 128) * -(-m // tile) * split
            if split == 1 or programs <= 300: yield f"bulk{tile}s{split}", "bulk", bulk_config(tile, split)
    old = old_row(m, n, k)
    if old is not None and m <= 1024: yield "old", "wgmma", old
def linears(shapes, tokens, warm=None):
    for n, k in shapes:
        ps = None
        for m in tokens:
            if (n in (8192, 2048) and m in (16, 4096)) or (n == 8192 and m == 512): continue
            ways = [(f"now:{c.way}", c.way, c.config) for c in [choose(torch.device(DEV, 0), m, n, k, 64, BF)]] + list(candidates(m, n, k))
            if warm is not None:
                warm += [(way, config, k, m) for _, way, config in ways if way != "dequantize"]; continue
            ps = ps or [weight(n, k) for _ in range(min(copies(n * k * 0.5625), 10))]
            x = torch.randn(m, k, device=DEV, dtype=BF); out = x.new_empty(m, n); row = {}
            dense = dequantize_4bit(ps[0].weight, ps[0].absmax, "nf4", 64, k, BF, ps[0].nested)
            good = (x @ dense.T).float()
            for name, way, config in ways:
                if way == "dequantize":
                    row[name] = microseconds([lambda p=p: torch.nn.functional.linear(x, dequantize_4bit(p.weight, p.absmax, "nf4", 64, k, BF, p.nested)) for p in ps], rest=m > 1000)
                    continue
                f = launcher(way); out.fill_(torch.nan); f(x, ps[0], None, out, config); err = ((out.float() - good).norm() / good.norm()).item()
                row[name] = microseconds([lambda p=p: f(x, p, None, out, config) for p in ps], rest=m > 1000) if err < 8e-3 else f"WRONG {err}"
            ws = [dense.clone() for _ in range(3)]
            row["bf16"] = microseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in ws], rest=m > 1000)
            print(json.dumps({"n": n, "k": k, "m": m, **{a: round(b, 1) if not isinstance(b, str) else b for a, b in row.items()}}), flush=True)
def stack_ways(rows, e, n, k):
    c = choose_grouped(torch.device(DEV, 0), rows, e, n, k, 64, BF)
    yield f"now:{c.way}", c.way, c.config, takes_rows(c)
    for tile in (32, 64, 128, 256):
        if rows >= 32: yield f"bulk{tile}", "bulk", bulk_config(tile), False
    for tile in (32, 64, 128, 256):
        if rows >= 64: yield f"old{tile}", "wgmma", WgmmaConfig(block_m=tile, block_n=128, split=1, warps=8, registers=128 if tile <= 64 else None), False
def stacks(models, warm=None):
    for name in models:
        e, top, h, i = MODELS[name]
        if warm is None: up, down = weight(2 * i, h, e), weight(h, i, e)
        for t in (1, 4, 16, 64, 512, 4096):
            rows = t * top
            if warm is not None:
                warm += [(way, config, k, -e) for n, k in ((2 * i, h), (h, i)) for _, way, config, _ in stack_ways(rows, e, n, k) if way != "dequantize"]; continue
            g = torch.Generator(device=DEV).manual_seed(t)
            ids = torch.stack([torch.randperm(e, device=DEV, generator=g)[:top] for _ in range(t)]).flatten().sort().values
            stops = torch.bincount(ids, minlength=e).cumsum(0).int()
            x = torch.randn(rows, h, device=DEV, dtype=BF); mid = x.new_empty(rows, 2 * i); y = x.new_empty(rows, h)
            ways = {}
            for one, two in zip(stack_ways(rows, e, 2 * i, h), stack_ways(rows, e, h, i)): ways[one[0] + "/" + two[0].split(":")[-1]] = (one, two)
            row, good = {}, None
            order = weights_of_rows(stops, rows)
            for key, (one, two) in ways.items():
                def call(one=one, two=two):
                    launcher(one[1])(x, up, None, mid, one[2], order if one[3] else stops)
                    a = gated(mid, "silu", 1.0, 0.0)
                    launcher(two[1])(a, down, None, y, two[2], order if two[3] else stops)
                try:
                    y.fill_(torch.nan); call(); torch.cuda.synchronize()
                except Exception as error:
                    row[key] = repr(error)[:60]; continue
                good = y.float().clone() if good is None else good
                err = ((y.float() - good).norm() / good.norm()).item()
                row[key] = round(microseconds([call] * 3), 1) if err < 2e-2 else f"WRONG {err}"
            print(json.dumps({"model": name, "t": t, **row}), flush=True)
def run_warm(index, count):
    jobs = []; linears(SHAPES, TOKENS, jobs); stacks(MODELS, jobs)
    unique = list(dict.fromkeys((way, config if not hasattr(config, "programs") else config, 2880 if k == 2880 else 768 if k == 768 else k, m if m < 0 else m) for way, config, k, m in jobs))
    seen = set(); picked = []
    for way, config, k, m in unique:
        key = (way, str(replace(config, programs=0)) if hasattr(config, "programs") else str(config), k % 256 == 0, k if way in ("sliced", "dp4a") else 0, m < 0)
        if key not in seen: seen.add(key); picked.append((way, config, k, m))
    for way, config, k, m in picked[index::count]:
        try:
            if m < 0:
                e = -m; p = weight(256, k, e); rows = 64; x = torch.randn(rows, k, device=DEV, dtype=BF)
                stops = torch.full((e,), rows, dtype=torch.int32, device=DEV)
                launcher(way)(x, p, None, x.new_empty(rows, 256), config, weights_of_rows(stops, rows) if way == "dp4a" or getattr(config, "single", False) else stops)
            else:
                x = torch.randn(m, k, device=DEV, dtype=BF); launcher(way)(x, weight(256, k), None, x.new_empty(m, 256), config)
            torch.cuda.synchronize()
        except Exception as error: print("warm", way, config, k, m, repr(error)[:200], flush=True)
    print("warmed", index, len(picked), flush=True)
if __name__ == "__main__":
    began = time.time()
    if sys.argv[1] == "warm": run_warm(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "linears": linears(SHAPES, TOKENS)
    else: stacks(MODELS)
    print(sys.argv[1], "took", round(time.time() - began, 1), flush=True)
