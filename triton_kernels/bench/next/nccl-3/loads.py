"""Seconds of loads of an 8B shape on one GPU and into two shards; read rates of one and of two processes."""
import json, os, sys, threading, time
import torch, torch.distributed as dist

TINY = os.environ.get("TINY") == "1"
H, I, L, V, HEADS, KV = (256, 512, 4, 1000, 4, 2) if TINY else (4096, 14336, 32, 128256, 32, 8)
DIR = sys.argv[2] if len(sys.argv) > 2 else "/dev/shm/shape8b"
HEAD = H // HEADS


def config():
    from transformers import LlamaConfig
    return LlamaConfig(hidden_size=H, intermediate_size=I, num_hidden_layers=L, num_attention_heads=HEADS, num_key_value_heads=KV,
                       vocab_size=V, tie_word_embeddings=False, use_cache=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def make():
    """Four files, written by four threads; every block has the same random numbers."""
    os.makedirs(DIR, exist_ok=True)
    config().save_pretrained(DIR)
    torch.manual_seed(0)
    block = {"self_attn.q_proj": (H, H), "self_attn.k_proj": (KV * HEAD, H), "self_attn.v_proj": (KV * HEAD, H), "self_attn.o_proj": (H, H),
             "mlp.gate_proj": (I, H), "mlp.up_proj": (I, H), "mlp.down_proj": (H, I)}
    cuda = torch.cuda.is_available()
    numbers = (torch.randn(max(I, V) * H, device="cuda:1" if cuda else "cpu") * 0.02).to(torch.bfloat16).cpu().view(torch.uint8).numpy()
    ones = torch.ones(H, dtype=torch.bfloat16).view(torch.uint8).numpy()
    files = [[] for _ in range(4)]
    files[0].append(("model.embed_tokens.weight", (V, H)))
    for layer in range(L):
        p = f"model.layers.{layer}."
        names = [(p + k + ".weight", s) for k, s in block.items()] + [(p + n + ".weight", (H,)) for n in ("input_layernorm", "post_attention_layernorm")]
        files[layer * 4 // L] += names
    files[3] += [("model.norm.weight", (H,)), ("lm_head.weight", (V, H))]
    weight_map = {}

    def write(number, tensors):
        name, header, at = f"model-{number + 1:05d}-of-00004.safetensors", {"__metadata__": {"format": "pt"}}, 0
        for key, shape in tensors:
            nbytes = 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
            weight_map[key] = name
            at += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(f"{DIR}/{name}", "wb", buffering=0) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, shape in tensors:
                data = memoryview(ones if len(shape) == 1 else numbers[: 2 * torch.Size(shape).numel()])
                while len(data):
                    data = data[file.write(data):]

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(files)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    json.dump({"metadata": {}, "weight_map": weight_map}, open(f"{DIR}/model.safetensors.index.json", "w"))
    open(f"{DIR}/made", "w").close()


def work(rank, folder):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from torch.distributed.device_mesh import init_device_mesh
    from bigq import QuantizationConfig, load_and_quantize_model
    from bigq.checkpoint import Checkpoint
    from bigq.integrations.frozen_shards import shard_frozen
    from bigq.loading.runs import Target
    from bigq.loading.stream import Budget, stream
    from bigq.loading.timings import Timings
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    sync = torch.cuda.synchronize if cuda else lambda: None
    mesh = init_device_mesh(device.type, (2,))
    began = time.time()

    def say(*words):
        print(f"[{time.time() - began:5.1f} s, rank {rank}]", *words, flush=True)

    def empty():
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config())

    def load(**how):
        return load_and_quantize_model(empty_, folder, QuantizationConfig("nf4"), progress=False, **how)

    def whole_then_frozen():
        return shard_frozen(load(device_map=device), mesh)

    def whole_then_fsdp():
        from torch.distributed.fsdp import fully_shard
        model = load(device_map=device)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def read(names_of):
        source = Checkpoint.open(folder)
        names = names_of(list(source.tensors))
        nbytes = sum(source.tensors[n].nbytes for n in names)
        sync(); dist.barrier() if both else None
        start = time.time()
        for pieces in stream(source, {n: Target(device=device) for n in names}, Budget.of_machine(), Timings()):
            del pieces
        sync()
        return f"{nbytes / 1e9:.2f} GB in {time.time() - start:.3f} s, {nbytes / 1e9 / (time.time() - start):.1f} GB/s"

    def frozen(m):
        return shard_frozen(m.requires_grad_(False), mesh)

    ways = {
        "one process, whole": (False, lambda: load(device_map=device)),
        "into frozen shards, all frozen": (True, lambda: load(mesh=mesh, shard=frozen)),
        "into FSDP2's shards": (True, lambda: load(mesh=mesh)),
    }
    say("budget", Budget.of_machine(), "cores", os.cpu_count())
    def reads():
        nonlocal both
        both = False
        if rank == 0:
            say("read all, one process:", read(lambda names: names))
            say("read half, one process:", read(lambda names: names[: len(names) // 2]))
        dist.barrier()
        both = True
        say("read half each, two processes:", read(lambda names: names[: len(names) // 2] if rank == 0 else names[len(names) // 2 :]))

    both = False
    for turn in range(2):
        for name, (both, call) in ways.items():
            if not both and rank:
                dist.barrier()
                continue
            times, peak, stages = [], 0, ""
            for again in range(2 if turn == 0 else 1):
                empty_ = empty()
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                sync()
                if both:
                    dist.barrier()
                start = time.time()
                model = call()
                sync()
                times.append(f"{time.time() - start:.3f}")
                stages = ", ".join(f"{s.name} {s.seconds:.2f}" for s in empty_.quantization_report.stages)
                peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0
                held = torch.cuda.memory_allocated() / 1e9 if cuda else 0
                del model, empty_
                import gc
                gc.collect()
            say(f"{name}: {' '.join(times)} s; peak {peak:.2f} GB, held {held:.2f}; {stages}")
            if not both:
                dist.barrier()
    return None


if __name__ == "__main__":
    if sys.argv[1] == "make":
        start = time.time()
        make()
        print(f"checkpoint made in {time.time() - start:.1f} s", flush=True)
    else:
        import tempfile
        from ranks import run_ranks
        run_ranks(work, tempfile.mkdtemp(), DIR, world=2, gpus=torch.cuda.is_available())
