"""One process for one variant: reads a command a line (JSON), answers a line (JSON) on the first stdout."""

import json
import os
import sys
import time
import traceback

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print goes to stderr
KIND, FOLDER = sys.argv[1:3]
TINY = bool(os.environ.get("TINY"))

import torch

DEV = "cpu" if TINY else "cuda:0"
HERE = {"": "cpu" if TINY else 0}
MAP = {"model.embed_tokens": HERE[""], "model.rotary_emb": HERE[""], "model.norm": HERE[""], "lm_head": HERE[""], "model.layers": "cpu"}


def answer(**row):
    ANSWERS.write(json.dumps(row) + "\n")
    ANSWERS.flush()


def sync():
    if not TINY:
        torch.cuda.synchronize()


def skeleton():
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER)).eval()


def ours(name, device_map=None, **settings):
    from bigq import NF4, QuantizationConfig, load_and_quantize_model
    config = QuantizationConfig(NF4(double_quant=True) if name == "nf4_dq" else name)
    return load_and_quantize_model(skeleton(), FOLDER, config, device_map or HERE, progress=False, **settings).eval()


class Decode:
    """A Llama with a static cache of 512: eager, in a CUDA graph, and compiled."""

    def __init__(self):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        if KIND == "bf16":
            self.model = AutoModelForCausalLM.from_pretrained(FOLDER, device_map=HERE, dtype=torch.bfloat16)
        elif KIND == "bnb":
            q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
            self.model = AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=q, device_map=HERE, dtype=torch.bfloat16)
        else:
            self.model = ours("nf4_dq" if KIND == "nf4_dq" else "nf4")
        self.model.eval()
        self.note = ""
        if KIND == "nf4_fused":
            import bigq
            fused = bigq.fuse_linears(self.model, torch.arange(2, device=DEV)[None])
            self.note = f"{len(fused.groups)} groups, {len(fused.left)} left"
        torch.manual_seed(5)
        self.ids = {n: torch.randint(0, 1000, (1, n), device=DEV) for n in (1, 16)}
        self.caches, self.graphs, self.compiled = {}, {}, None
        with torch.no_grad():
            for n in (1, 16):
                self.cache(n)
                self.call(n)
        sync()

    def cache(self, key):
        from transformers import StaticCache
        if key not in self.caches:
            self.caches[key] = StaticCache(config=self.model.config, max_cache_len=512)
        return self.caches[key]

    def call(self, n):
        return self.model(input_ids=self.ids[n], past_key_values=self.caches[n]).logits

    @torch.no_grad()
    def eager(self, n, calls=10):
        self.caches[n].reset()
        self.call(n)
        sync()
        t = time.perf_counter()
        for _ in range(calls):
            self.call(n)
        sync()
        return {"ms": (time.perf_counter() - t) / calls * 1e3}

    @torch.no_grad()
    def graph(self, n, calls=10):
        if TINY:
            return {"ms": 0}
        if n not in self.graphs:
            self.caches[n].reset()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.call(n)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.call(n)
            self.graphs[n] = graph, out
        graph, out = self.graphs[n]
        self.caches[n].reset()
        graph.replay()
        return {"ms": timed(graph.replay, calls)}

    @torch.no_grad()
    def compile(self):
        began = time.perf_counter()
        self.cache("compiled")
        mode = {} if TINY else {"mode": "reduce-overhead"}
        self.call_on("compiled", self.model, 16)
        for fullgraph in (True, False):
            try:
                self.compiled = torch.compile(self.model.forward, fullgraph=fullgraph, **mode)
                for _ in range(4):
                    if not TINY:
                        torch.compiler.cudagraph_mark_step_begin()
                    self.call_on("compiled", self.compiled, 1)
                sync()
                break
            except Exception as error:
                self.note += f" fullgraph={fullgraph}: {error!r}"[:600]
                self.compiled = None
                torch._dynamo.reset()
        from torch._dynamo.utils import counters
        return {"seconds": round(time.perf_counter() - began, 1), "fullgraph": fullgraph, "note": self.note,
                "works": self.compiled is not None, "stats": dict(counters["stats"]), "breaks": list(counters["graph_break"])[:5],
                "inductor": {k: v for k, v in counters["inductor"].items() if "cudagraph" in k}}

    def call_on(self, key, f, n):
        return f(input_ids=self.ids[n], past_key_values=self.caches[key]).logits

    @torch.no_grad()
    def run_compiled(self, calls=20):
        def call():
            if not TINY:
                torch.compiler.cudagraph_mark_step_begin()
            self.call_on("compiled", self.compiled, 1)

        self.caches["compiled"].reset()
        call()
        sync()
        t = time.perf_counter()
        ms = timed(call, calls)
        return {"ms": ms, "wall_ms": (time.perf_counter() - t) / calls * 1e3}

    @torch.no_grad()
    def kernels(self, n=1):
        """Kernels of a token in the graph, by name."""
        from torch.profiler import ProfilerActivity, profile
        graph, _ = self.graphs[n]
        self.caches[n].reset()
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            graph.replay()
            torch.cuda.synchronize()
        rows = [(k.key[:90], round(k.self_device_time_total / 1e3, 3), k.count) for k in prof.key_averages() if k.self_device_time_total]
        rows.sort(key=lambda k: -k[1])
        return {"total_ms": round(sum(ms for _, ms, _ in rows), 2), "rows": rows[:16]}

    def check(self):
        """The sum of the logits of the first 16 tokens, and one row, to compare variants."""
        with torch.no_grad():
            self.caches[16].reset()
            logits = self.call(16).float()
        return {"norm": logits.norm().item(), "head": [round(x, 4) for x in logits[0, -1, :4].tolist()], "note": self.note}


def timed(call, calls):
    """Milliseconds of a call by events of the GPU."""
    if TINY:
        t = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - t) / calls * 1e3
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    a.record()
    for _ in range(calls):
        call()
    b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b) / calls


class Offload:
    """Forward passes without a cache of a model whose layers are on the CPU, one way after the other."""

    def __init__(self):
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
        from bigq import load_and_quantize_model  # noqa: F401
        self.link = None
        self.outputs = {}

    def measure_link(self):
        if TINY:
            self.link = 1e9
            return {"gbs": 1}
        n = 1 << 30
        p, g = torch.empty(n, dtype=torch.uint8, pin_memory=True), torch.empty(n, dtype=torch.uint8, device=DEV)
        g.copy_(p, non_blocking=True)
        self.link = n / timed(lambda: g.copy_(p, non_blocking=True), 5) * 1e3
        return {"gbs": round(self.link / 1e9, 2)}

    @torch.no_grad()
    def way(self, name, tokens, rounds):
        import gc
        before, t = host_nbytes(), time.perf_counter()
        model, groups = self.make(name)
        sync()
        load = time.perf_counter() - t
        held = host_nbytes() - before
        row = {"load_s": round(load, 2), "host_gb": round(held / 1e9, 3), "ms": {}}
        if hasattr(model, "quantization_report"):
            cpu = sum(m.nbytes for m in model.quantization_report.modules if m.device == "cpu" and ".layers." in m.name)
            row |= {"offloaded_gb": round(cpu / 1e9, 3), "link_ms": round(cpu / self.link * 1e3, 1)}
            row["blocks"] = len({m.name.split(".layers.")[1].split(".")[0] for m in model.quantization_report.modules
                                 if m.device == "cpu" and ".layers." in m.name})
        elif groups:
            row |= {"offloaded_gb": round(groups / 1e9, 3), "link_ms": round(groups / self.link * 1e3, 1)}
        for m in tokens:
            torch.manual_seed(m)
            ids = torch.randint(0, 1000, (1, m), device=DEV)
            out = model(input_ids=ids, use_cache=False).logits
            if m <= 16:
                row.setdefault("norm", {})[m] = out.float().norm().item()
            del out
            model(input_ids=ids, use_cache=False)
            ms = []
            for _ in range(rounds if m <= 512 else max(2, rounds // 2)):
                sync()
                t = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                sync()
                ms.append((time.perf_counter() - t) * 1e3)
            row["ms"][m] = [round(x, 1) for x in ms]
        if not TINY:
            row["gpu_held_gb"] = round(torch.cuda.memory_allocated() / 1e9, 3)
            others = [p for n, p in model.named_parameters() if ".layers." not in n and p.is_cuda]
            row["gpu_rest_gb"] = round(sum(p.nbytes for p in others) / 1e9, 3)
        del model
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()
        return row

    def make(self, name):
        if name == "resident":
            return ours("nf4"), 0
        if name in ("nf4", "int8"):
            return ours(name, MAP, offload="quantized"), 0
        if name == "bf16":
            return ours("nf4", MAP), 0
        if name == "half":
            if TINY:
                return ours("nf4", {**MAP, "model.layers.0": "cpu"}, offload="quantized"), 0
            return ours("nf4", "auto", max_memory={0: "4.4GB", "cpu": "60GB"}, offload="quantized"), 0
        if name == "accelerate":
            from accelerate import load_checkpoint_and_dispatch
            model = load_checkpoint_and_dispatch(skeleton(), FOLDER, device_map=MAP, dtype=torch.bfloat16)
            return model.eval(), sum(p.numel() * 2 for p in model.model.layers.parameters())
        if name == "diffusers":
            from diffusers.hooks import apply_group_offloading
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained(FOLDER, device_map=HERE, dtype=torch.bfloat16).eval()
            model.model.layers.to("cpu")
            apply_group_offloading(model.model, onload_device=torch.device(DEV), offload_device=torch.device("cpu"),
                                   offload_type="block_level", num_blocks_per_group=1, use_stream=True, record_stream=True)
            return model, sum(p.nbytes for p in model.model.layers.parameters())
        raise ValueError(name)


def host_nbytes():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return sum(int(lines[k].split()[0]) for k in ("RssAnon", "RssShmem")) * 1024


class Linear:
    """Host time of eager calls of one linear of 1024 x 1024 in bf16, by library."""

    def __init__(self):
        import bitsandbytes as bnb
        from torch import nn
        from bigq import NF4, QuantizationConfig, load_and_quantize_model
        k = 256 if TINY else 1024

        def plain():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(k, k, bias=False, dtype=torch.bfloat16, device=DEV))

        def ours(fmt):
            return load_and_quantize_model(plain(), None, QuantizationConfig(fmt, skip_defaults=False), HERE, progress=False)[0]

        dense = plain()[0]
        four = bnb.nn.Linear4bit(k, k, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False, device="meta")
        four.weight = bnb.nn.Params4bit(plain()[0].weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=four).to(DEV)
        weight = dense.weight.detach()
        self.rows = {"F.linear": lambda x: nn.functional.linear(x, weight), "nn.Linear": dense, "nf4": ours("nf4"),
                     "nf4, nested": ours(NF4(double_quant=True)), "int8": ours("int8"), "bitsandbytes nf4": four}
        try:
            if not TINY:
                eight = bnb.nn.Linear8bitLt(k, k, bias=False, has_fp16_weights=False, threshold=6.0)
                eight.weight = bnb.nn.Int8Params(plain()[0].weight.data.half().cpu(), has_fp16_weights=False, requires_grad=False)
                self.rows["bitsandbytes int8"] = eight.to(DEV)
        except Exception as error:
            print("no bitsandbytes int8", repr(error), flush=True)
        self.k = k

    @torch.no_grad()
    def batches(self, tokens, batches, calls):
        x = torch.randn(tokens, self.k, device=DEV, dtype=torch.bfloat16)
        found = {}
        for i in range(batches + 1):
            for name, f in list(self.rows.items()):
                try:
                    sync()
                    t = time.perf_counter()
                    for _ in range(calls):
                        f(x)
                    us = (time.perf_counter() - t) / calls * 1e6
                    sync()
                except Exception as error:
                    found[name] = repr(error)[:200]
                    del self.rows[name]
                    continue
                if i:
                    found.setdefault(name, []).append(us)
        return {"us": {n: [round(min(v), 1), round(sorted(v)[len(v) // 2], 1)] if isinstance(v, list) else v for n, v in found.items()}}


def main():
    import transformers  # noqa: F401
    from bigq import load_and_quantize_model  # noqa: F401
    while not os.path.exists(f"{FOLDER}/WRITTEN"):
        time.sleep(0.05)
    try:
        thing = {"offload": Offload, "linear": Linear}.get(KIND, Decode)()
        answer(ready=KIND)
    except Exception:
        answer(error=traceback.format_exc()[-1500:])
        return
    for line in sys.stdin:
        command = json.loads(line)
        number = command.pop("id")
        try:
            answer(id=number, **getattr(thing, command.pop("do"))(**command))
        except Exception:
            answer(id=number, error=traceback.format_exc()[-1500:])


main()
