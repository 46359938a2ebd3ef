"""Write a bf16 checkpoint of random numbers in the shape of Llama-3-8B (TINY=1: a tiny one), by several threads."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

TINY = bool(os.environ.get("TINY"))
SIZES = (dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=1024) if TINY else
         dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=int(os.environ.get("LAYERS", 32)),
              num_attention_heads=32, num_key_value_heads=8, vocab_size=128256))


def names():
    h, i, v = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    kv = h // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    yield "model.embed_tokens.weight", (v, h)
    for layer in range(SIZES["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        for name, shape in {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
                            "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h),
                            "mlp.down_proj": (h, i), "input_layernorm": (h,), "post_attention_layernorm": (h,)}.items():
            yield f"{p}{name}.weight", shape
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (v, h)


def nbytes(shape):
    n = 2
    for size in shape:
        n *= size
    return n


def make(folder):
    began = time.time()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
              "tie_word_embeddings": False, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "bos_token_id": 1,
              "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    shards, size = [[]], 0
    for name, shape in names():
        if size > 4.5e9:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes(shape)
    places, jobs = {}, []
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard:
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes(shape)]}
            offset += nbytes(shape)
            places[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        fd = os.open(folder / file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.pwrite(fd, len(text).to_bytes(8, "little") + text, 0)
        jobs += [(fd, 8 + len(text) + header[name]["data_offsets"][0], shape) for name, shape in shard]
    total = sum(nbytes(shape) for *_, shape in jobs)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))

    def write(job):
        fd, offset, shape = job
        device = "cpu" if TINY else "cuda"
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensor = (torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()
        data = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done : done + (256 << 20)], offset + done)

    torch.manual_seed(0)
    with ThreadPoolExecutor(2 if TINY else 12) as pool:
        list(pool.map(write, jobs))
    for fd in {fd for fd, *_ in jobs}:
        os.close(fd)
    (folder / "WRITTEN").write_text("")
    return total, time.time() - began


if __name__ == "__main__":
    total, seconds = make(sys.argv[1])
    print(json.dumps({"row": "checkpoint", "gb": round(total / 1e9, 2), "seconds": round(seconds, 1)}), flush=True)
