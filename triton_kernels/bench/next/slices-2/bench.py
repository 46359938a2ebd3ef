"""Times of 4-bit linears of few tokens: what `choose` of main takes, of the branch, and candidates of `sliced`."""

import json, os, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context

import torch

import old_choose
import old_sliced
from bigq_kernels.block4 import choose as new_choose
from bigq_kernels.block4.absmax import with_code
from bigq_kernels.block4 import row_parts
from bigq_kernels.block4.configs import SlicedConfig, dp4a_config
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.gluon import sliced as new_sliced
from bigq_kernels.block4.gluon.table import code_tables
from bigq_kernels.block4.linear import launcher
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.row_parts import add_parts_of_rows
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div
from bigq_kernels.timing import copies

GPU = Gpu.named("h200")
OUT = os.path.join(os.environ.get("OUT", "/tmp"), "slices-2")

# name: (warps, covers, stages, flush, programs of a multiprocessor)
ROWS = {
    8: {"r1": (8, 1, 2, 2, 2), "r1f4": (8, 1, 2, 4, 2), "r2": (16, 1, 2, 4, 1)},
    16: {"s1": (8, 1, 3, 1, 2), "s1f2": (8, 1, 2, 2, 2), "s1f2s3": (8, 1, 3, 2, 2), "s2": (16, 1, 2, 2, 1), "s2f4": (16, 1, 2, 4, 1)},
}
SLICES = [  # 192 or 256; K that is no multiple of 256
    (5120, 2880), (6144, 2560), (5120, 5120), (9728, 2560), (8960, 1536), (1536, 1536), (13824, 5120), (27648, 5120),
    (4096, 3072), (4096, 6144), (4544, 4544), (8192, 1024), (2048, 1024), (1024, 768), (4096, 4608), (4096, 1280), (4096, 4096 + 32),
]
DEEP = [  # K split over programs
    (28672, 8192), (4096, 14336), (8192, 28672), (5120, 13824), (3584, 18944), (4096, 11008), (2560, 9728), (1536, 8960),
]
SAME = [(14336, 4096), (4096, 4096), (1024, 4096), (18944, 3584), (2880, 4096)]
NESTED = [(28672, 8192), (4096, 14336), (8192, 28672), (14336, 4096), (5120, 13824), (5120, 5120), (5120, 2880), (13824, 5120)]


def config_of(m, n, k, row, quarters):
    block_m = 8 if m <= 8 else 16
    warps, covers, stages, flush, resident = ROWS[block_m][row]
    split = ceil_div(k, 64 * quarters * warps * covers)
    return SlicedConfig(block_m=block_m, warps=warps, quarters=quarters, covers=covers, split=split, stages=stages,
                        flush=flush, programs=resident * 132, registers=min(255, 65536 // (32 * warps * resident)))


def launch_variant(spread, ahead, adds, x, packed, bias, out, config):
    """The launcher of the branch for a linear, with what it decides itself given; without the second kernel if not adds."""
    s, (n, pairs) = x.shape[0], packed.weight.shape
    tiles, steps = n // (16 * config.abreast), ceil_div(pairs, 32 * config.quarters)
    programs = min(config.programs // config.split, tiles) * config.split
    is_split = config.split > 1
    partial_ = torch.empty(is_split * config.split, s, n, dtype=torch.float32, device=x.device)
    even = pairs % (32 * config.quarters) == 0
    whole = even and steps == config.split * config.warps // config.abreast * config.covers
    launch(
        new_sliced._linear_4bit_sliced_kernel, (programs,),
        x, packed.weight, packed.absmax, bias, *packed.nested, partial_, out, None, s, n, pairs,
        packed.absmax.shape[-1], 1, 1, *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, WHOLE=whole, EVEN=even, SPREAD=spread, AHEAD=ahead, PDL=True, SINGLE=False,
        BLOCK_M=config.block_m, QUARTERS=config.quarters, COVERS=config.covers,
        ABREAST=config.abreast, SPLIT=config.split, STAGES=config.stages, FLUSH=config.flush,
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": True},
    )
    if is_split and adds:
        add_parts_of_rows(partial_, bias, out, config.split, None, 1, s, config.block_m, False)


def run(job, x, packed, out):
    how, config = job[0], job[1]
    if how == "old-sliced":
        old_sliced.linear_4bit_sliced(x, packed, None, out, config)
    elif how[0] == "v":
        row_parts.COLUMNS = int(how[3:]) if how[3:].isdigit() else 256
        launch_variant(how[1] == "s", how[2] == "a", how[3:] != "n", x, packed, None, out, config)
        row_parts.COLUMNS = 256
    else:
        launcher(how)(x, packed, None, out, config)


def chosen(choose, m, n, k, prefix):
    choice = choose(GPU, m, n, k, 64, torch.bfloat16)
    way = prefix + choice.way if choice.way == "sliced" else choice.way
    return way, choice.config


def candidates(m, n, k, nested):
    """[(label, (how, config))]; how "vsl": variant, spread, late; "vpl" plain; "n": no sum; a number: columns of a sum."""
    found = [("old", chosen(old_choose.choose, m, n, k, "old-")), ("new", chosen(new_choose.choose, m, n, k, ""))]
    new, block_m = found[1][1], 8 if m <= 8 else 16
    if m <= 2 and new[0] == "sliced":
        found.append(("dp4a", ("dp4a", dp4a_config(GPU, m, n, k)))) if m == 1 else None
    if m not in (4, 16):
        return found
    if (n, k) in SLICES and new[0] == "sliced":
        for quarters in (4, 3):
            c = replace(new[1], quarters=quarters)
            if k > 64 * quarters * c.covers * c.warps // c.abreast:
                continue
            found.append((f"q{quarters}-spread-late", ("vsl", c)))
            found.append((f"q{quarters}-spread-ahead", ("vsa", c)))
            if quarters == 4 and k % 256 == 0:
                found.append((f"q{quarters}-plain", ("vpl", c)))
        if (n, k) in ((5120, 2880), (8960, 1536), (13824, 5120), (4096, 3072)):
            for stages, flush in ((2, 2), (2, 4), (3, 1), (3, 2), (3, 4)):
                if (m == 16 and flush == 4) or (stages, flush) == (new[1].stages, new[1].flush):
                    continue
                found.append((f"new-s{stages}f{flush}", ("vsa", replace(new[1], stages=stages, flush=flush))))
    if (n, k) in DEEP or (m == 16 and k > 4096):
        for row in ROWS[block_m]:
            for quarters in (4, 3):
                c = config_of(m, n, k, row, quarters)
                full = k / (c.split * 64 * quarters * c.covers * c.warps)
                if full < 0.6 or (quarters == 3 and (full < 0.8 or row not in ("r1", "s1f2", "s2") or k > 9000)):
                    continue
                if row in ("r1f4", "s1f2s3") and (n, k) not in DEEP[:3]:
                    continue
                spread = quarters == 3
                found.append((f"{row}-q{quarters}x{c.split}", ("vsl" if spread else "vpl", c)))
                if quarters == 4 and row in ("r1", "s1f2", "s2") and nested:
                    found.append((f"{row}-q{quarters}x{c.split}-spread", ("vsl", c)))
                if (n, k) in DEEP[:3] and quarters == 4 and row in ("r1", "s1f2", "s2") and not nested:
                    for columns in ("n", "128", "512", "1024"):
                        found.append((f"{row}-q{quarters}x{c.split}-{columns}", (f"vpl{columns}", c)))
    return found


def weight_of(n, k, nested, device="cuda"):
    b = ceil_div(k, 64)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    if nested:
        absmax = torch.randint(0, 256, (n, b), dtype=torch.uint8, device=device)
        absmax, tables = with_code(absmax, torch.rand(ceil_div(n * b, 256), device=device), torch.rand(1, device=device))
    else:
        absmax, tables = torch.rand(n, b, device=device) + 0.5, (None, None, None)
    return Packed4(codes, absmax, tables, "nf4", 64)


def compile_one(m, k, nested, job):
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    try:
        run(job, x, weight_of(256, k, nested), x.new_empty(m, 256))
        torch.cuda.synchronize()
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-300:]}"


def key(m, k, nested, job):
    """What a compiled kernel depends on."""
    how, config = job
    if how == "sliced":
        how = "vsa" if config.quarters < 4 or (config.covers > 1 and nested) else "vpl"
    same = {name: 0 for name in ("programs", "blocks") if hasattr(config, name)}
    of_k = k % 256 == 0, ceil_div(k, 64) % 16 == 0
    if isinstance(config, SlicedConfig) or how == "old-sliced":
        slice_ = 64 * config.quarters
        of_k += k % slice_ == 0, k == slice_ * config.split * config.covers * config.warps // config.abreast
    elif how == "dp4a":
        of_k += m, k % (1024 * config.warps) == 0, k // 32 % 16 == 0, ceil_div(k, 1024 * config.warps)
    return nested, how[:3] if how[0] == "v" else how, str(replace(config, **same)) if config else "", of_k


def all_cases():
    cases = [(n, k, m, False) for n, k in DEEP[:2] + SLICES[:3] + SAME[:1] for m in (4, 16)]
    cases += [(n, k, m, True) for n, k in NESTED for m in (16, 4)]
    cases += [(n, k, m, False) for n, k in SLICES + DEEP + SAME for m in (4, 16)]
    cases += [(n, k, m, False) for n, k in SLICES + DEEP + SAME for m in (1, 2, 8)]
    cases += [(n, k, m, True) for n, k in NESTED for m in (1,)]
    groups = {}
    for case in dict.fromkeys(cases):
        groups.setdefault((case[0], case[1], case[3]), []).append(case)
    return list(groups.values())


def capture(calls):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_us(graph, calls, repeats):
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return times


def time_group(group, stop):
    n, k, _, nested = group[0]
    weights = [weight_of(n, k, nested) for _ in range(copies(n * k / 2))]
    dense = dequantize_4bit(weights[0].weight, weights[0].absmax, "nf4", 64, k, torch.float32, weights[0].nested).double()
    rows = []
    for n, k, m, nested in group:
        if time.perf_counter() > stop:
            print("out of time at", n, k, m, nested, flush=True)
            break
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        exact, out, graphs = x.double() @ dense.T, x.new_empty(m, n), {}
        for label, job in candidates(m, n, k, nested):
            if any(job == other for _, other, *_ in graphs.values()):
                continue
            try:
                run(job, x, weights[0], out.fill_(torch.nan))
                error = ((out.double() - exact).norm() / exact.norm()).item()
                if not error < 3e-3 and not job[0].endswith("n"):
                    print("WRONG", n, k, m, nested, label, job, error, flush=True)
                graphs[label] = capture([partial(run, job, x, w, out) for w in weights]), job, error, []
            except Exception as failure:
                print("FAILED", n, k, m, nested, label, str(failure)[-300:], flush=True)
                if "CUDA error" in str(failure) or "illegal" in str(failure):
                    raise
        for turn in range(4):
            for graph, _, _, times in graphs.values():
                found = replay_us(graph, len(weights), 8)
                times += found[2:] if turn else []
        for label, (_, job, error, times) in graphs.items():
            times.sort()
            rows.append(dict(n=n, k=k, m=m, nested=nested, label=label, how=job[0], us=times[len(times) // 2],
                             least=times[0], error=error, config=str(asdict(job[1])) if job[1] else ""))
    return rows


def worker(number, count, barrier, lock, limit_s):
    groups = all_cases()
    mine = list(enumerate(groups))[number::count]
    loaded = set()
    for _, group in mine:
        for n, k, m, nested in group:
            for _, job in candidates(m, n, k, nested):
                if key(m, k, nested, job) not in loaded:
                    loaded.add(key(m, k, nested, job))
                    said = compile_one(m, k, nested, job)
                    if said:
                        print("LOAD", n, k, m, nested, job, said, flush=True)
    try:
        barrier.wait(60)
    except Exception as error:
        print("barrier", repr(error), flush=True)
    stop = time.perf_counter() + limit_s
    for index, group in mine:
        with lock:
            rows = time_group(group, stop) if time.perf_counter() < stop else []
            torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with open(os.path.join(OUT, f"rows-{index:02}.json"), "w") as file:
            json.dump(rows, file)


def main():
    begin = time.perf_counter()
    os.makedirs(OUT, exist_ok=True)
    groups, jobs = all_cases(), {}
    for group in groups:
        for n, k, m, nested in group:
            for _, job in candidates(m, n, k, nested):
                jobs.setdefault(key(m, k, nested, job), (m, k, nested, job))
    context = get_context("spawn")
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=context)
    futures = {pool.submit(compile_one, *job): job for job in jobs.values()}
    failed = 0
    for future in as_completed(futures, timeout=100):
        try:
            said = future.result()
        except Exception as error:
            said = repr(error)
        if said:
            failed += 1
            if failed <= 5:
                print("COMPILE", futures[future], said)
    pool.shutdown(wait=True)
    print(f"{len(jobs)} kernels, {failed} failed, {time.perf_counter() - begin:.0f} s", flush=True)
    count = min(12, os.cpu_count() or 2)
    barrier, lock = context.Barrier(count), context.Lock()
    limit = float(os.environ.get("TIME_S", "60"))
    workers = [context.Process(target=worker, args=(i, count, barrier, lock, limit)) for i in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    rows = []
    for index in range(len(groups)):
        try:
            with open(os.path.join(OUT, f"rows-{index:02}.json")) as file:
                rows += json.load(file)
        except OSError:
            print("no rows of", groups[index])
    with open(os.path.join(OUT, "table.txt"), "w") as file:
        case = None
        for r in rows:
            if case != (r["n"], r["k"], r["m"], r["nested"]):
                case = r["n"], r["k"], r["m"], r["nested"]
                file.write(f"\n{case[0]} x {case[1]} m {case[2]}{' nested' if case[3] else ''}:")
            file.write(f" {r['label']}({r['how']}) {r['us']:.2f};")
    worst = max((r["error"] for r in rows if not r["how"].endswith("n")), default=0)
    print(f"{len(rows)} times, {time.perf_counter() - begin:.0f} s in all; largest error {worst:.2e}")


if __name__ == "__main__":
    main()
