"""Whole mixtures of experts with random weights: bigq nf4, bf16 and bitsandbytes' two ways.

python whole.py qwen3 --stages nf4,bf16,bnb_experts,bnb_linears --seconds 130 --out FILE [--tiny] [--compiled]
"""

import argparse
import gc
import os
import sys
import time
import warnings

import torch
from peers import experts_in_4_bits, linears_in_4_bits
from rows import Report, replays, spread, sync, times
from shapes import NAMES, SHAPES
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("model", choices=list(SHAPES))
parser.add_argument("--stages", default="nf4,bf16,bnb_experts,bnb_linears")
parser.add_argument("--seconds", type=float, default=130)
parser.add_argument("--out")
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--compiled", action="store_true", help="only tokens: eager, in a graph, with compiled layers")
args = parser.parse_args()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
if not ON_GPU:
    torch.set_num_threads(1)
DTYPE = torch.bfloat16
PREFILLS = (16, 32) if args.tiny else (512, 2048)
PROMPT, CACHE = 16 if args.tiny else 64, 512
report = Report(args.out, args.seconds)
kind, config = SHAPES[args.model](args.tiny)
VOCABULARY = config.vocab_size
name = NAMES[args.model]


def allocated():
    return torch.cuda.memory_allocated() if ON_GPU else 0


def free():
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_ids(count):
    generator = torch.Generator(device=DEVICE).manual_seed(count)
    return torch.randint(0, VOCABULARY, (1, count), device=DEVICE, generator=generator)


def build():
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model = kind(SHAPES[args.model](args.tiny)[1])
    finally:
        torch.set_default_dtype(torch.float32)
    # A residual stream that the embeddings dominate, so that tokens differ in all layers and are routed to all experts,
    # as in trained models. With 0.02, the tokens of deep layers resemble each other and hit the same 30 of 128.
    nn.init.normal_(model.model.embed_tokens.weight, std=5.0)
    return model.eval().requires_grad_(False)


def experts_hit(model, ids):
    """How many experts of a layer are hit, and the largest share of rows that one has, on average over layers."""
    seen = []

    def hook(module, inputs, output):
        counts = torch.bincount(output[2].reshape(-1), minlength=module.num_experts)
        seen.append(((counts > 0).sum(), counts.max() / counts.sum()))

    hooks = [m.register_forward_hook(hook) for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    last = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float()
    for own in hooks:
        own.remove()
    hit, share = zip(*seen, strict=True)
    return last, round(sum(map(float, hit)) / len(hit), 1), round(sum(map(float, share)) / len(share), 3)


@torch.no_grad()
def make(stage):
    """The model of a stage, on the device."""
    free()
    before, begin = allocated(), time.time()
    model = build()
    sync()
    facts = {"build_s": round(time.time() - begin, 2)}
    dense, hit, share = experts_hit(model, random_ids(PREFILLS[0]))
    facts |= {"experts_hit": hit, "largest_share": share, "gb_bf16": round((allocated() - before) / 1e9, 2)}
    begin = time.time()
    if stage.startswith("nf4"):
        import bigq

        bigq.load_and_quantize_model(
            model, None, bigq.QuantizationConfig("nf4"), 0 if ON_GPU else "cpu", progress=False
        )
        facts["quantized"] = model.quantization_report.table().splitlines()[-1]
    elif stage.startswith("bnb"):
        facts["linears"] = linears_in_4_bits(model)
        if stage == "bnb_experts":
            facts["stacks"] = experts_in_4_bits(model)
    sync()
    facts |= {
        "quantize_s": round(time.time() - begin, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if ON_GPU else 0,
    }
    free()
    facts["gb"] = round((allocated() - before) / 1e9, 3)
    experts = next(
        m
        for m in model.modules()
        if (hasattr(m, "num_experts") and hasattr(m, "act_fn")) or "Experts" in type(m).__name__
    )
    facts["experts_class"] = " < ".join(k.__name__ for k in type(experts).__mro__[:3])
    facts["implementation"] = model.config._experts_implementation
    if stage != "bf16":
        got = experts_hit(model, random_ids(PREFILLS[0]))[0]
        facts["logits_difference"] = round(float((got - dense).norm() / dense.norm()), 3)
        facts["finite"] = bool(got.isfinite().all())
    report(model=name, stage=stage, row="built", **facts)
    return model


@torch.no_grad()
def prefill(model, stage):
    for count in PREFILLS:
        with report.part(4, 60, model=name, stage=stage, row=f"{count} tokens") as go:
            if go:
                ids = random_ids(count)
                found = times(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), 9, 3)
                report(model=name, stage=stage, row=f"{count} tokens", unit="ms", **spread(found))


def own_masks(cache, at):
    """Masks by attention type, as `generate` prepares them: the eager ones of transformers copy a scalar from the host,
    which no CUDA graph can hold."""

    def mask(length):
        allowed = torch.arange(length, device=DEVICE) <= at
        return torch.where(allowed, 0.0, torch.finfo(DTYPE).min).to(DTYPE)[None, None, None]

    lengths = {own.is_sliding: own.max_cache_len for own in cache.layers}
    return {"full_attention": mask(lengths[False]), "sliding_attention": mask(lengths.get(True, lengths[False]))}


def token_call(model, **more):
    """A call of one token after a prompt, with a static cache; the count of calls may grow to 60."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    model(input_ids=random_ids(PROMPT), past_key_values=cache, use_cache=True, logits_to_keep=1)
    one = random_ids(1)
    if model.config._attn_implementation == "eager" and more.pop("masks", False):
        more["attention_mask"] = own_masks(cache, PROMPT)
    more.pop("masks", None)
    return (lambda: model(input_ids=one, past_key_values=cache, use_cache=True, **more).logits), cache


@torch.no_grad()
def tokens(model, stage):
    label = {"model": name, "stage": stage}
    ways = ["grouped_mm", "batched_mm"] if stage in ("bf16", "bnb_linears") else [None]
    for way in ways:
        if way:
            model.set_experts_implementation(way)
        suffix = f", {way}" if way else ""
        with report.part(3, 60, **label, row=f"a token, eager{suffix}") as go:
            if go:
                call, _ = token_call(model)
                report(**label, row=f"a token, eager{suffix}", unit="ms", **spread(times(call, 15, 4)))
        if ON_GPU:
            with report.part(3, 60, **label, row=f"a token, graph{suffix}") as go:
                if go:
                    call, _ = token_call(model, masks=True)
                    report(**label, row=f"a token, graph{suffix}", unit="ms", **spread(replays(call, 20)))
        elif args.tiny:
            alone, given = token_call(model)[0]().float(), token_call(model, masks=True)[0]().float()
            report(**label, row="masks", difference=float((given - alone).norm() / alone.norm()))
    if ways[0]:
        model.set_experts_implementation("grouped_mm")


class OwnCache(nn.Module):
    """A layer of a model that gets a cache of its own with one layer, so that all layers compile to the same code."""

    def __init__(self, layer, compiled):
        super().__init__()
        self.layer, self.compiled, self.cache = layer, compiled, None

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=True,
        position_embeddings=None,
        **more,
    ):
        return self.compiled(self.layer, hidden_states, attention_mask, position_ids, self.cache, position_embeddings)


def run_layer(layer, hidden_states, mask, position_ids, cache, position_embeddings):
    return layer(
        hidden_states,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        position_embeddings=position_embeddings,
    )


def with_compiled_layers(model, cache, is_whole):
    """Each layer of the model compiled (one compilation for all), with its part of `cache`."""
    import copy

    import torch._dynamo as dynamo

    dynamo.config.recompile_limit = 16
    dynamo.reset()
    backend = os.environ.get("BACKEND", "inductor")
    options = {"triton.cudagraphs": False} if backend == "inductor" else None
    compiled = torch.compile(run_layer, fullgraph=is_whole, dynamic=False, backend=backend, options=options)
    shims = []
    for layer, part in zip(model.model.layers, cache.layers, strict=True):
        for tensor in (part.keys, part.values, part.cumulative_length):
            tensor.__dict__.pop("_dynamo_static_input_type", None)  # its address would be a guard: 48 compilations
        layer.self_attn.layer_idx = 0
        shim = OwnCache(layer, compiled)
        shim.cache = copy.copy(cache)
        shim.cache.layers = [part]
        shims.append(shim)
    model.model.layers = nn.ModuleList(shims)


@torch.no_grad()
def compiled_tokens(model, stage, row="a token, compiled layers"):
    label = {"model": name, "stage": stage}
    with report.part(8, 100, **label, row=row) as go:
        if not go:
            return
        import torch._dynamo as dynamo

        dynamo.utils.counters.clear()
        wanted = token_call(model, masks=True)[0]().float()
        call, cache = token_call(model, masks=True)
        layers = model.model.layers
        with_compiled_layers(model, cache, not stage.startswith("bnb"))
        begin = time.time()
        got = call().float()
        sync()
        first = time.time() - begin
        frames = dict(dynamo.utils.counters["frames"])
        stats = dynamo.utils.counters["stats"]["unique_graphs"]
        difference = float((got - wanted).norm() / wanted.norm())
        report(
            **label,
            row=f"{row}: compiled",
            seconds=round(first, 1),
            graphs=stats,
            frames=frames,
            difference=round(difference, 4),
        )
        report(**label, row=f"{row}, eager", unit="ms", **spread(times(call, 10, 3)))
        if ON_GPU:
            report(**label, row=f"{row}, in a graph", unit="ms", **spread(replays(call, 20)))
        model.model.layers = layers
        for index, layer in enumerate(layers):
            layer.self_attn.layer_idx = index


def lora(model, stage):
    label = {"model": name, "stage": stage, "row": "LoRA step 1 x 2048"}
    with report.part(6, 60, **label) as go:
        if not go:
            return
        import peft

        free()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora_config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        adapted = peft.get_peft_model(model, lora_config)
        adapted.train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ids = random_ids(PREFILLS[-1])

        def step():
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        loss = float(step())
        found = times(step, 4, 1)
        peak = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0
        layer = type(next(m for n, m in adapted.named_modules() if n.endswith("q_proj"))).__mro__[0]
        report(
            **label,
            unit="ms",
            **spread(found),
            peak_gb=round(peak, 2),
            loss=round(loss, 2),
            trained=len(trained),
            adapter=f"{layer.__module__}.{layer.__name__}",
        )
        if stage == "nf4":
            from bigq.integrations.fused_lora import fuse_lora

            fuse_lora(adapted)
            report(**(label | {"row": label["row"] + ", fuse_lora"}), unit="ms", **spread(times(step, 4, 2)))


def main():
    warnings.simplefilter("ignore")
    import transformers
    import triton

    import bigq

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    try:
        import bitsandbytes
        import peft

        versions |= {"peft": peft.__version__, "bitsandbytes": bitsandbytes.__version__}
    except ImportError as error:
        report(row="import", error=str(error))
    gpu = torch.cuda.get_device_name() if ON_GPU else "cpu"
    report(row="machine", gpu=gpu, versions=versions, bigq=os.path.dirname(bigq.__file__), argv=sys.argv[1:])
    for stage in args.stages.split(","):
        model = None
        with report.part(7, 90, model=name, stage=stage, row="build") as go:
            if go:
                model = make(stage)
        if model is None:
            continue
        if args.compiled:
            if stage == "nf4_fused":
                with torch.no_grad():
                    found = bigq.fuse_linears(model, input_ids=random_ids(1), use_cache=False)
                report(model=name, stage=stage, row="fuse_linears", groups=len(found.groups))
            tokens(model, stage)
            compiled_tokens(model, stage)
            if stage == "bf16":
                model.set_experts_implementation("batched_mm")
                compiled_tokens(model, stage, "a token, batched_mm, compiled layers")
        else:
            prefill(model, stage)
            tokens(model, stage)
            lora(model, stage)
        del model
        free()
    report(row="end", seconds=round(args.seconds - report.left(), 1))


main()
