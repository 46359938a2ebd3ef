"""One process for one way of loading: imports, says so, and loads when it is told to. python worker.py WAY[:FORMAT] FOLDER"""

import gc
import json
import os
import sys
import threading
import time
import traceback

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print goes to stderr
WAY, FORMAT = (sys.argv[1].split(":") + [""])[:2]
FOLDER, LAYERS = sys.argv[2], int(sys.argv[3])
TINY = bool(os.environ.get("TINY"))

import torch

DEV = "cpu" if TINY else "cuda:0"
HERE = {"": "cpu" if TINY else 0}


def answer(**row):
    ANSWERS.write(json.dumps(row) + "\n")
    ANSWERS.flush()


def sync():
    if not TINY:
        torch.cuda.synchronize()


class Peak(threading.Thread):
    """The peak of this process's own memory; pages of files are left out."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stop = 0, False

    @staticmethod
    def now():
        lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
        return sum(int(lines[k].split()[0]) for k in ("RssAnon", "RssShmem")) * 1024

    def run(self):
        while not self.stop:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)


def plain_skeleton():
    """The checkpoint's names in plain torch, on meta: what a process can build that has not imported transformers."""
    import checkpoint
    from torch import nn
    s = checkpoint.SIZES
    h, i, v = s["hidden_size"], s["intermediate_size"], s["vocab_size"]
    kv = h // s["num_attention_heads"] * s["num_key_value_heads"]
    made = {"device": "meta", "dtype": torch.bfloat16}

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(h, **made))

    def holder(**parts):
        module = nn.Module()
        for name, part in parts.items():
            setattr(module, name, part)
        return module

    def linear(n, k):
        return nn.Linear(k, n, bias=False, **made)

    layers = nn.ModuleList(
        holder(self_attn=holder(q_proj=linear(h, h), k_proj=linear(kv, h), v_proj=linear(kv, h), o_proj=linear(h, h)),
               mlp=holder(gate_proj=linear(i, h), up_proj=linear(i, h), down_proj=linear(h, i)),
               input_layernorm=Norm(), post_attention_layernorm=Norm())
        for _ in range(LAYERS))
    embed = nn.Embedding.from_pretrained(torch.empty(v, h, **made), freeze=False)
    return holder(model=holder(embed_tokens=embed, layers=layers, norm=Norm()), lm_head=linear(v, h)).eval()


def skeleton():
    if WAY == "bare":
        return plain_skeleton()
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER)).eval()


def config():
    from bigq import NF4, QuantizationConfig
    return QuantizationConfig(NF4(double_quant=True) if FORMAT == "nf4_dq" else FORMAT)


def peers_config():
    from transformers import BitsAndBytesConfig
    if FORMAT == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return BitsAndBytesConfig(load_in_8bit=True)


def prepare():
    """What is not timed before a load, and the load."""
    if WAY in ("bare", "tf"):
        from bigq import load_and_quantize_model
        empty, c = skeleton(), config()
        return lambda: load_and_quantize_model(empty, FOLDER, c, HERE, progress=False)
    if WAY == "ready":  # a folder that holds quantized weights, by load_and_quantize_model
        from bigq import load_and_quantize_model
        empty = skeleton()
        return lambda: load_and_quantize_model(empty, FOLDER, None, HERE, progress=False)
    if WAY in ("fp_ready", "bnb_ready"):
        from transformers import AutoModelForCausalLM
        return lambda: AutoModelForCausalLM.from_pretrained(FOLDER, device_map=HERE, dtype=torch.bfloat16)
    if WAY == "fp":
        from transformers import AutoModelForCausalLM
        c = config()
        return lambda: AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=c, device_map=HERE, dtype=torch.bfloat16)
    if WAY == "transformers_bnb":
        from transformers import AutoModelForCausalLM
        c = peers_config()
        return lambda: AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=c, device_map=HERE, dtype=torch.bfloat16)
    if WAY == "accelerate_bnb":
        from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
        c = (BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, torch_dtype=torch.bfloat16)
             if FORMAT == "nf4" else BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.bfloat16))
        empty = skeleton()
        return lambda: load_and_quantize_model(empty, c, weights_location=FOLDER, device_map=HERE)
    raise ValueError(WAY)


def load(times):
    """Seconds of the first load and of later ones; peaks of the first."""
    if not TINY:
        torch.zeros(1, device=DEV)
    row = {"triton_before": "triton" in sys.modules, "transformers_before": "transformers" in sys.modules}
    seconds = []
    for number in range(times):
        call = prepare()
        gc.collect()
        sync()
        if not number:
            if not TINY:
                torch.cuda.reset_peak_memory_stats()
            peak = Peak()
            base = peak.now()
            peak.start()
        t = time.perf_counter()
        model = call()
        sync()
        seconds.append(round(time.perf_counter() - t, 3))
        if not number:
            peak.stop = True
            peak.join()
            row |= {"host_peak_gb": round((peak.peak - base) / 1e9, 3), "host_after_gb": round((peak.now() - base) / 1e9, 3)}
            if not TINY:
                row |= {"gpu_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                        "gpu_end_gb": round(torch.cuda.memory_allocated() / 1e9, 2),
                        "reserved_over_peak": round(torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated(), 3)}
            if hasattr(model, "quantization_report"):
                row["stages"] = {s.name: round(s.seconds, 3) for s in model.quantization_report.stages}
        del model, call
        gc.collect()
    return {"first": seconds[0], "again": seconds[1:], **row}


def save(folders):
    """An NF4 model in the layout of bitsandbytes, and in bigq's own by save_pretrained, for the rows of quantized folders."""
    import bigq
    from transformers import AutoModelForCausalLM
    row = {}
    model = AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=config(), device_map=HERE, dtype=torch.bfloat16)
    for layout, folder in folders.items():
        t = time.perf_counter()
        if layout == "bitsandbytes":
            bigq.save_quantized(model, folder, layout="bitsandbytes")
            if not os.path.exists(f"{folder}/config.json"):
                row["no_config"] = True
        else:
            model.save_pretrained(folder)
        row[layout] = round(time.perf_counter() - t, 2)
        row[f"{layout} gb"] = round(sum(e.stat().st_size for e in os.scandir(folder)) / 1e9, 2)
    return row


def limit():
    """The link's rate, and reading the files by 12 threads into pinned memory and from there to the GPU."""
    from concurrent.futures import ThreadPoolExecutor
    size = 1 << 20 if TINY else 64 << 20
    pin = {} if TINY else {"pin_memory": True}
    row = {}
    if not TINY:
        n = 1 << 30
        p, g = torch.empty(n, dtype=torch.uint8, **pin), torch.empty(n, dtype=torch.uint8, device=DEV)
        g.copy_(p, non_blocking=True)
        torch.cuda.synchronize()
        t = time.perf_counter()
        for _ in range(4):
            g.copy_(p, non_blocking=True)
        torch.cuda.synchronize()
        row["link_gbs"] = round(4 * n / (time.perf_counter() - t) / 1e9, 1)
    chunks = []
    for name in sorted(os.listdir(FOLDER)):
        if name.endswith(".safetensors"):
            path = f"{FOLDER}/{name}"
            end = os.path.getsize(path)
            chunks += [(path, at, min(size, end - at)) for at in range(0, end, size)]
    fds = {path: os.open(path, os.O_RDONLY) for path, *_ in chunks}
    buffers = [torch.empty(size, dtype=torch.uint8, **pin) for _ in range(12)]
    targets = [torch.empty(size, dtype=torch.uint8, device=DEV) for _ in range(12)]
    for copies in (False, True):
        def work(i):
            view, event = memoryview(buffers[i].numpy()), None
            stream = None if TINY else torch.cuda.Stream()
            for path, at, n in chunks[i::12]:
                if event is not None:
                    event.synchronize()
                got = 0
                while got < n:
                    got += os.preadv(fds[path], [view[got:n]], at + got)
                if copies and not TINY:
                    with torch.cuda.stream(stream):
                        targets[i][:n].copy_(buffers[i][:n], non_blocking=True)
                        event = torch.cuda.Event()
                        event.record()

        for _ in range(2):
            t = time.perf_counter()
            with ThreadPoolExecutor(12) as pool:
                list(pool.map(work, range(12)))
            sync()
            row["read_and_copy_s" if copies else "read_s"] = round(time.perf_counter() - t, 3)
    row["gb"] = round(sum(n for *_, n in chunks) / 1e9, 2)
    return row


def main():
    if WAY == "bare":
        import bigq  # noqa: F401
    else:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
        if "bnb" in WAY:
            import bitsandbytes  # noqa: F401
        else:
            import bigq  # noqa: F401
        if WAY in ("fp", "fp_ready"):
            import bigq.integrations.transformers  # noqa: F401
        if FORMAT == "as_bnb":
            from bigq.integrations.transformers import use_as_bitsandbytes
            use_as_bitsandbytes()
    answer(ready=WAY)
    for line in sys.stdin:
        command = json.loads(line)
        number = command.pop("id")
        try:
            answer(id=number, **globals()[command.pop("do")](**command))
        except Exception:
            answer(id=number, error=traceback.format_exc()[-1500:])


main()
