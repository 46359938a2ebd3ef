"""QLoRA steps of an 8B shape by turns: bigq (eager, fuse_lora, compiled blocks), bitsandbytes, bf16; JSON lines.

TINY=1 runs a tiny model on the CPU. Rows are written as they are known; the last row of a name counts.
"""

import contextlib
import copy
import gc
import io
import json
import logging
import os
import re
import sys
import time

T0 = time.time()
import peft
import torch
import torch.nn as nn
from transformers import LlamaConfig, LlamaForCausalLM

TINY = bool(os.environ.get("TINY"))
DEV = "cpu" if TINY else "cuda"
BUDGET = float(os.environ.get("BUDGET", 142))
OUT = open(os.path.join(os.environ.get("RESULTS", "."), "compiled.jsonl"), "a")
ROUNDS = 4 if TINY else 10
LAYERS = 0
LENGTH = 16 if TINY else 2048
SHAPES = {"1 x 2048": (1, LENGTH), "4 x 2048": (4, LENGTH), "4 x 512, no checkpointing": (4, LENGTH // 4)}


def write(**row):
    row["at"] = round(time.time() - T0, 1)
    line = json.dumps(row)
    print(line[:400], flush=True)
    OUT.write(line + "\n")
    OUT.flush()


def left():
    return BUDGET - (time.time() - T0)


def sync():
    if not TINY:
        torch.cuda.synchronize()


def allocated():
    return 0 if TINY else torch.cuda.memory_allocated()


def build():
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS or 4, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=1024) if TINY else dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS or 32,
                 num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
    cfg = LlamaConfig(tie_word_embeddings=False, max_position_embeddings=8192,
                      rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **sizes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEV):
        m = LlamaForCausalLM(cfg)
    torch.set_default_dtype(torch.float32)
    return m


def to_bitsandbytes(m):
    import bitsandbytes as bnb
    for mod in list(m.modules()):
        for name, c in list(mod.named_children()):
            if isinstance(c, nn.Linear) and name != "lm_head":
                q = bnb.nn.Linear4bit(c.in_features, c.out_features, bias=False, compute_dtype=torch.bfloat16,
                                      quant_type="nf4", compress_statistics=False, device="meta")
                q.weight = bnb.nn.Params4bit(c.weight.data, requires_grad=False, quant_type="nf4",
                                             compress_statistics=False, module=q).to(DEV)
                setattr(mod, name, q)
    m.is_loaded_in_4bit = True
    return m


def to_bigq(m):
    from bigq import QuantizationConfig, load_and_quantize_model
    return load_and_quantize_model(m, None, QuantizationConfig("nf4"), {"": "cpu" if TINY else 0})


class Run:
    """A model with adapters, its optimizer, and the seconds of its steps by variant."""

    def __init__(self, m):
        for p in m.parameters():
            p.requires_grad_(False)
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m.config.use_cache = False
        self.base = m
        self.model = peft.get_peft_model(m, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0))
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.layers = m.model.layers
        self.compiled = None

    def held(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        states = [getattr(m.weight, "quant_state", None) for m in self.model.modules() if isinstance(m, nn.Linear)]
        tensors += [t for s in states if s is not None for t in (s.absmax, s.code)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == DEV}.values())

    def compile(self, on):
        if on and self.compiled is None:
            for layer in self.layers:
                layer.compile(dynamic=False)
            self.compiled = [layer._compiled_call_impl for layer in self.layers]
        for i, layer in enumerate(self.layers):
            layer._compiled_call_impl = self.compiled[i] if on else None

    def step(self, ids):
        """Seconds of forward, backward and optimizer on the host, and of the whole with the GPU; peak; loss."""
        sync()
        before, held = allocated(), self.held()
        if not TINY:
            torch.cuda.reset_peak_memory_stats()
        t = time.perf_counter()
        with torch.autocast(DEV, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        t3 = time.perf_counter()
        sync()
        t4 = time.perf_counter()
        peak = 0 if TINY else torch.cuda.max_memory_allocated() - before + held
        return dict(total=t4 - t, host=t3 - t, forward=t1 - t, backward=t2 - t1, peak=peak, loss=loss.item())


def median(values):
    return sorted(values)[len(values) // 2]


def summary(name, shape, steps):
    total = [s["total"] * 1e3 for s in steps]
    write(row=name, shape=shape, n=len(steps), min=round(min(total), 1), median=round(median(total), 1),
          host_min=round(min(s["host"] for s in steps) * 1e3, 1), host_median=round(median([s["host"] for s in steps]) * 1e3, 1),
          forward_min=round(min(s["forward"] for s in steps) * 1e3, 1),
          peak_gb=round(max(s["peak"] for s in steps) / 1e9, 2), loss=round(steps[-1]["loss"], 4), all=[round(x) for x in total])


def counters():
    from torch._dynamo.utils import counters as c
    return dict(stats=dict(c["stats"]), breaks=dict(list(c["graph_break"].items())[:5]), cache={k: v for k, v in c["inductor"].items() if "fxgraph" in k})


def checkpointing(run, on):
    for module in run.model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


MAKE = {"bigq": to_bigq, "bnb": to_bitsandbytes, "bf16": lambda m: m}


def prewarm(name):
    """Compile the blocks of a model of two layers in every shape: inductor keeps the code on the disk."""
    run = Run(MAKE[name](build()))
    run.compile(True)
    for shape, size in SHAPES.items():
        checkpointing(run, "no check" not in shape)
        run.step(torch.randint(0, 1000, size, device=DEV))
        print("prewarmed", name, shape, round(time.time() - T0, 1), flush=True)


def main():
    from bigq.integrations.fused_lora import fuse_lora, unfuse_lora
    torch._dynamo.config.recompile_limit = 64
    runs, base = {}, build()
    for name in ("bigq", "bnb"):
        runs[name] = Run(MAKE[name](copy.deepcopy(base)))
    runs["bf16"] = Run(base)
    sync()
    gc.collect()
    if not TINY:
        torch.cuda.empty_cache()
    gc.freeze()
    write(row="versions", torch=torch.__version__, peft=peft.__version__, gpu="" if TINY else torch.cuda.get_device_name(),
          held={n: round(r.held() / 1e9, 2) for n, r in runs.items()})
    for process in PREWARM:
        try:
            process.wait(timeout=max(1, min(300 if TINY else 60, left() - 70)))
        except Exception:
            process.kill()
    write(row="prewarmed", codes=[process.poll() for process in PREWARM])
    state = {"fused": False}

    def prepare(variant, shape):
        name, *how = variant.split()
        run = runs[name]
        if name == "bigq" and state["fused"] != ("fused" in how):
            state["fused"] = "fused" in how
            (fuse_lora if state["fused"] else unfuse_lora)(run.model)
        run.compile("compiled" in how)
        checkpointing(run, "no check" not in shape)
        return run

    torch.manual_seed(1)
    data = {shape: torch.randint(0, 1000, size, device=DEV) for shape, size in SHAPES.items()}
    every = ["bigq compiled", "bnb compiled", "bf16 compiled", "bigq fused", "bigq", "bnb", "bf16"]
    for shape, variants in {"1 x 2048": every[:4], "4 x 2048": every[:4], "4 x 512, no checkpointing": every}.items():
        works = []
        for v in variants:
            try:
                seconds = [round(prepare(v, shape).step(data[shape])["total"], 2) for _ in range(2)]
                write(row="first steps", variant=v, shape=shape, seconds=seconds, **(counters() if "compiled" in v else {}))
                works.append(v)
            except Exception as error:
                write(row="failed", variant=v, shape=shape, error=repr(error)[:800])
                runs[v.split()[0]].optimizer.zero_grad()
        steps = {v: [] for v in works}
        for i in range(ROUNDS):
            for v in works:
                if left() > 3:
                    steps[v].append(prepare(v, shape).step(data[shape]))
        for v in works:
            if steps[v]:
                summary(v, shape, steps[v])
    write(row="end", **counters())


if __name__ == "__main__":
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    if len(sys.argv) > 1:
        LAYERS = 2
        prewarm(sys.argv[1])
    else:
        import subprocess
        PREWARM = [subprocess.Popen([sys.executable, "-W", "ignore", os.path.abspath(__file__), name]) for name in MAKE]
        try:
            main()
        finally:
            for process in PREWARM:
                if process.poll() is None:
                    process.kill()
