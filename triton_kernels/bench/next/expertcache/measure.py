"""Microseconds of a token in layers of Qwen3-30B-A3B whose experts are in host memory, with a cache and without one.

    PYTHONPATH=.:triton_kernels python triton_kernels/bench/next/expertcache/measure.py

The layer: calls in one CUDA graph, whose experts are chosen so that a known share is in the cache. The model: one token
in a CUDA graph, for the same token again, tokens in random order, and tokens of which half repeat the one before. Each
output is compared bit for bit with that of experts in host memory and on the GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import bigq

ROUNDS = 5
VOCABULARY = 4096


def build(shape: argparse.Namespace, device: str) -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        moe_intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for layer in model.model.layers:  # logits of a router that differ from token to token
            layer.mlp.gate.weight.normal_(std=0.5)
    return model


def loaded(shape: argparse.Namespace, device: str, place: str) -> nn.Module:
    """The model with its experts in `place`; all else is on `device`."""
    device_map = {"": device} | {f"model.layers.{i}.mlp.experts": place for i in range(shape.layers)}
    config = bigq.QuantizationConfig("nf4", double_quant=shape.nested)
    if place == device:
        device_map = {"": device}
    model = bigq.load_and_quantize_model(
        build(shape, device), None, config, device_map, offload="quantized", progress=False
    )
    return model.requires_grad_(False)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `call`, which has run before: kernels compile, replays are recorded and bound."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def microseconds(step: Callable[[], object], count: int) -> float:
    """The median of a few rounds of `step`, divided by `count`."""
    times = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / count)
    return statistics.median(times)


def routes(shape: argparse.Namespace, share: float) -> list[Tensor]:
    """The experts of one token after another, of which `share` were hit by the token before, and no other lately."""
    new = round(shape.top_k * (1 - share))
    if not new:
        return [torch.arange(shape.top_k)[None]] * 8
    count = shape.experts // new
    return [(torch.arange(shape.top_k) + i * new)[None] % shape.experts for i in range(count)]


def layer_times(shape: argparse.Namespace, offloaded: nn.Module, resident: nn.Module, nbytes: int) -> None:
    expert_nbytes = (
        sum(
            tensor.nbytes
            for name, tensor in offloaded.model.layers[0].mlp.experts._parameters.items()
            if tensor is not None and name != "quant_state"
        )
        // shape.experts
    )
    x = torch.randn(1, shape.hidden, device="cuda").bfloat16()
    weights = torch.full((1, shape.top_k), 1 / shape.top_k, device="cuda").bfloat16()
    print(f"\none layer: {shape.experts} experts of {expert_nbytes / 1e6:.2f} MB, {shape.top_k} a token")
    print("| in the cache | on the GPU us | host memory us | cache us | of host memory | link GB/s host, cache |")
    print("|---|---|---|---|---|---|")
    for share in (0.0, 0.5, 1.0):
        ids = [each.cuda() for each in routes(shape, share)]
        found: list[list[Tensor]] = []
        times = []
        for model, size in ((resident, 0), (offloaded, 0), (offloaded, nbytes)):
            if model is offloaded:
                bigq.cache_experts(model, size)
            experts = model.model.layers[0].mlp.experts
            outputs: list[Tensor] = []

            def call(experts: nn.Module = experts, outputs: list[Tensor] = outputs, ids: list[Tensor] = ids) -> None:
                outputs[:] = [experts(x, each, weights) for each in ids]

            graph = captured(call)
            graph.replay()
            times.append(microseconds(graph.replay, len(ids)))
            found.append([out.clone() for out in outputs])
            del graph
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)), share
        gpu, host, cache = times
        copied = shape.top_k * expert_nbytes
        rate = (1 - share) * copied / cache / 1e3
        print(
            f"| {share:.0%} | {gpu:.1f} | {host:.1f} | {cache:.1f} | {cache / host:.2f} | "
            f"{copied / host / 1e3:.1f}, {rate:.1f} |",
            flush=True,
        )


def tokens_of(kind: str, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
    if kind == "the same":
        return [drawn[0]] * count
    if kind == "half repeated":
        repeats = (torch.rand(count, generator=generator) < 0.5).tolist()
        for i in range(1, count):
            drawn[i] = drawn[i - 1] if repeats[i] else drawn[i]
    return drawn


def hit_share(
    shape: argparse.Namespace, model: nn.Module, step: Callable[[int], object], tokens: Sequence[int]
) -> float:
    """The share of hit experts that were in the cache, from what its slots hold before and after each token."""
    caches = [layer.mlp.experts.expert_cache for layer in model.model.layers]
    copied = 0
    for token in tokens:
        before = [cache._held.clone() for cache in caches]
        step(token)
        copied += sum(int((cache._held != old).sum()) for cache, old in zip(caches, before, strict=True))
    return 1 - copied / (len(tokens) * shape.layers * shape.top_k)


def model_times(shape: argparse.Namespace, offloaded: nn.Module, resident: nn.Module) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    print(f"\n{shape.layers} layers, a token in a CUDA graph")
    print("| cached experts | MB | tokens | hits | us | eager us |")
    print("|---|---|---|---|---|---|")
    kinds = ("the same", "half repeated", "random")
    expected: dict[str, list[Tensor]] = {}
    one = bigq.weight.expert_cache.ExpertCache
    cases: list[tuple[str, nn.Module, int]] = [("on the GPU", resident, 0), ("host memory", offloaded, 0)]
    cases += [(str(slots), offloaded, slots) for slots in shape.slots]
    for name, model, slots in cases:
        nbytes = 0
        if model is offloaded:
            experts = model.model.layers[0].mlp.experts
            nbytes = shape.layers * one.nbytes_of(experts.cached_specs(slots)[0], slots) if slots else 0
            bigq.cache_experts(model, nbytes)
        out: list[Tensor] = []

        def call(model: nn.Module = model, out: list[Tensor] = out) -> None:
            out[:] = [model(ids, use_cache=False).logits]

        graph = captured(call)

        def replayed(token: int, graph: torch.cuda.CUDAGraph = graph) -> None:
            ids.fill_(token)
            graph.replay()

        for kind in kinds:
            tokens = tokens_of(kind, 64)
            logits = []
            for token in tokens[:16]:
                replayed(token)
                logits.append(out[0].clone())
            if kind in expected:
                assert all(map(torch.equal, logits, expected[kind])), (name, kind)
            expected.setdefault(kind, logits)
            hits = f"{hit_share(shape, model, replayed, tokens):.0%}" if slots else ""

            def replay_all(tokens: list[int] = tokens, replayed: Callable[[int], None] = replayed) -> None:
                for token in tokens:
                    replayed(token)

            taken = microseconds(replay_all, len(tokens))
            eager = ""
            if kind == "half repeated":
                start = time.perf_counter()
                for token in tokens[:20]:
                    ids.fill_(token)
                    call()
                torch.cuda.synchronize()
                eager = f"{(time.perf_counter() - start) * 1e6 / 20:.0f}"
            print(f"| {name} | {nbytes / 1e6:.0f} | {kind} | {hits} | {taken:.0f} | {eager} |", flush=True)
        del graph


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in {"hidden": 2048, "inner": 768, "experts": 128, "top-k": 8, "layers": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--slots", type=lambda text: [int(part) for part in text.split(",")], default=[8, 16, 32, 64])
    parser.add_argument("--nested", action="store_true")
    shape = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, bigq.__version__)
    start = time.perf_counter()
    resident, offloaded = loaded(shape, "cuda:0", "cuda:0"), loaded(shape, "cuda:0", "cpu")
    print(f"loaded in {time.perf_counter() - start:.1f} s")
    with torch.no_grad():
        experts = offloaded.model.layers[0].mlp.experts
        quarter = shape.experts // 4
        nbytes = bigq.weight.expert_cache.ExpertCache.nbytes_of(experts.cached_specs(quarter)[0], quarter)
        layer_times(shape, offloaded, resident, shape.layers * nbytes)
        model_times(shape, offloaded, resident)
    print(f"measured in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
