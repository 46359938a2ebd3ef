"""The experts module of transformers as a model calls it, in bigq's nf4 and in bf16: times by the number of tokens.

python modules.py --seconds 140 --out FILE [--tiny]
"""

import argparse
import copy
import os
import sys
import time
import warnings

import torch
from rows import Report, sync
from shapes import NAMES, SHAPES
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float, default=140)
parser.add_argument("--out")
parser.add_argument("--models", default="qwen3,mixtral,gptoss")
parser.add_argument("--parts", default="forward,gradient,compiled")
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
if not ON_GPU:
    torch.set_num_threads(1)
TOKENS = (1, 4, 16) if args.tiny else (1, 4, 16, 64, 512, 4096)
GRADIENT = (1, 16) if args.tiny else (1, 16, 64, 512, 4096)
report = Report(args.out, args.seconds)


def readings(calls, repeats=15, graph=True):
    """Microseconds of one of the calls, sorted: captured in one graph, or launched one after the other."""
    if ON_GPU:
        from bigq_kernels.timing import readings as on_gpu

        for call in calls:  # each of them once: the third call with a signature is a replay
            call()
        return on_gpu(calls, repeats, graph)
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        for call in calls:
            call()
        found.append((time.perf_counter() - begin) * 1e6 / len(calls))
    return sorted(found)


def modules(name):
    """The experts of one layer in bf16 and in nf4, with the same weights before they were quantized."""
    import bigq

    kind, config = SHAPES[name](args.tiny)
    config.num_hidden_layers = 1
    config._experts_implementation = "grouped_mm"
    import importlib

    found = importlib.import_module(kind.__module__)
    experts = next(getattr(found, own) for own in dir(found) if own.endswith("Experts"))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        dense = experts(config)
    torch.set_default_dtype(torch.float32)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_(False)
    wrapper = nn.Module()
    wrapper.experts = copy.deepcopy(dense)
    wrapper.eval()
    bigq.load_and_quantize_model(wrapper, None, bigq.QuantizationConfig("nf4"), 0 if ON_GPU else "cpu", progress=False)
    dense.eval()
    return dense, wrapper.experts, config


def inputs(config, tokens, which, needs_grad=False):
    generator = torch.Generator(device=DEVICE).manual_seed(1000 * tokens + which)
    x = torch.randn(tokens, config.hidden_size, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    scores = torch.randn(tokens, config.num_local_experts, device=DEVICE, generator=generator)
    top, ids = scores.topk(config.num_experts_per_tok, dim=-1)
    weights = top.softmax(-1).to(torch.bfloat16)
    return x.requires_grad_(needs_grad), ids, weights.requires_grad_(needs_grad)


def routings(tokens):
    """How many routings are captured one after the other, so that the weights of few experts do not stay in L2."""
    return 8 if tokens <= 16 else 3 if tokens <= 512 else 2


@torch.no_grad()
def forward(name, dense, quantized, config, compiled=None):
    label = {"model": NAMES[name]}
    for tokens in TOKENS:
        rows = [inputs(config, tokens, which) for which in range(routings(tokens))]
        wanted, got = dense(*rows[0]).float(), quantized(*rows[0]).float()
        found = {"difference": round(float((got - wanted).norm() / wanted.norm()), 3)}
        for way, module in (("bigq nf4", quantized), ("transformers bf16", dense)):
            calls = [lambda own=own, module=module: module(*own) for own in rows]
            for graph in (False, True):
                times = readings(calls, 15 if tokens < 4096 else 9, graph)
                key = f"{way}, {'CUDA graph' if graph else 'eager'}"
                found[key] = [round(times[0], 1), round(times[len(times) // 2], 1)]
        report(**label, part="forward", tokens=tokens, routings=len(rows), us_min_median=found)
    dense.config._experts_implementation = "batched_mm"
    for tokens in (1, 4):
        rows = [inputs(config, tokens, which) for which in range(routings(tokens))]
        times = readings([lambda own=own: dense(*own) for own in rows])
        report(
            **label,
            part="forward",
            tokens=tokens,
            us_min_median={
                "transformers bf16 batched_mm, CUDA graph": [round(times[0], 1), round(times[len(times) // 2], 1)]
            },
        )
    dense.config._experts_implementation = "grouped_mm"


def gradient(name, dense, quantized, config):
    label = {"model": NAMES[name]}
    for tokens in GRADIENT:
        rows = [inputs(config, tokens, which, True) for which in range(routings(tokens))]
        seeds = [torch.randn_like(own[0]) for own in rows]
        found, grads = {}, {}
        for way, module in (("bigq nf4", quantized), ("transformers bf16", dense)):

            def call(own, seed, module=module):
                x, ids, weights = own
                return torch.autograd.grad(module(x, ids, weights), (x, weights), seed)

            calls = [
                lambda own=own, seed=seed, call=call: call(own, seed) for own, seed in zip(rows, seeds, strict=True)
            ]
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            grads[way] = calls[0]()[0].float()
            if ON_GPU:
                found[f"{way}, MB at the peak"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
            times = readings(calls, 15 if tokens < 4096 else 9)
            found[f"{way}, forward and backward"] = [round(times[0], 1), round(times[len(times) // 2], 1)]
            with torch.no_grad():
                plain = [(own[0].detach(), own[1], own[2].detach()) for own in rows]
                times = readings([lambda own=own, module=module: module(*own) for own in plain])
                found[f"{way}, forward"] = [round(times[0], 1), round(times[len(times) // 2], 1)]
        got, wanted = grads.values()
        found["difference"] = round(float((got - wanted).norm() / wanted.norm()), 3)
        report(**label, part="gradient", tokens=tokens, routings=len(rows), us_min_median=found)


@torch.no_grad()
def compiled(name, dense, quantized, config):
    torch._dynamo.reset()
    for tokens in (1, 512) if not args.tiny else (1,):
        for way, module in (("bigq nf4", quantized), ("transformers bf16", dense)):
            made = torch.compile(module, fullgraph=True, dynamic=False, backend=os.environ.get("BACKEND", "inductor"))
            rows = [inputs(config, tokens, which) for which in range(routings(tokens))]
            times = readings([lambda own=own, made=made: made(*own) for own in rows])
            report(
                model=NAMES[name],
                part="compiled",
                tokens=tokens,
                us_min_median={f"{way}, compiled, CUDA graph": [round(times[0], 1), round(times[len(times) // 2], 1)]},
            )


def main():
    warnings.simplefilter("ignore")
    import transformers
    import triton

    import bigq

    gpu = torch.cuda.get_device_name() if ON_GPU else "cpu"
    report(
        row="machine",
        gpu=gpu,
        bigq=os.path.dirname(bigq.__file__),
        argv=sys.argv[1:],
        versions={"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__},
    )
    parts = {"forward": forward, "gradient": gradient, "compiled": compiled}
    for part in args.parts.split(","):
        for name in args.models.split(","):
            with report.part(8, 90, model=NAMES[name], part=part) as go:
                if go:
                    dense, quantized, config = modules(name)
                    report(
                        model=NAMES[name],
                        part=part,
                        classes=[type(dense).__name__, *(k.__name__ for k in type(quantized).__mro__[:2])],
                    )
                    parts[part](name, dense, quantized, config)
                    del dense, quantized
            sync()
            if ON_GPU:
                torch.cuda.empty_cache()
    report(row="end")


main()
