"""Milliseconds of a step in frozen shards of 32 small blocks, where the host is the bound, with tags and without, by turns."""
import statistics, tempfile, time
from unittest import mock
import torch, torch.distributed as dist
from torch import nn


class Block(nn.Module):
    def __init__(self, width=256):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(7))
        self.adapter = nn.Parameter(torch.randn(width))

    def forward(self, x):
        y = x * self.adapter
        for linear in self.linears:
            y = y + linear(y)
        return x + y * 1e-3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(32))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def work(rank):
    from bigq import QuantizationConfig, load_and_quantize_model
    from bigq.integrations import frozen_shards
    from bigq.integrations.unit_tags import Tags
    from ranks import mesh_of, own_device
    frozen_shards.SMALLEST = 1024
    torch.manual_seed(0)
    model = load_and_quantize_model(Net(), None, QuantizationConfig("nf4"), own_device()).requires_grad_(False)
    for block in model.blocks:
        block.adapter.requires_grad_(True)
    model = frozen_shards.shard_frozen(model, mesh_of(2))
    x = torch.randn(16, 256, device=own_device())
    sync = torch.cuda.synchronize if own_device().type == "cuda" else lambda: None

    def step():
        dist.barrier(); sync()
        start = time.perf_counter()
        model(x).square().mean().backward()
        queued = time.perf_counter() - start
        sync()
        return 1e3 * (time.perf_counter() - start), 1e3 * queued

    pairs = 3 if own_device().type == "cpu" else 80
    step(), step()
    own, none = (Tags.arrive, Tags.check), (lambda *a: None, lambda *a, **k: None)
    found = {"with tags": [], "without": []}
    for pair in range(pairs):
        for name in ("with tags", "without") if pair % 2 else ("without", "with tags"):
            Tags.arrive, Tags.check = own if name == "with tags" else none
            found[name].append(step())
    if rank == 0:
        for name, times in found.items():
            print(name, *(f"{what} min {min(v):.2f} median {statistics.median(v):.2f} ms;" for what, v in zip(("step", "host"), zip(*times))), flush=True)
        for k, what in enumerate(("step", "host")):
            differences = [a[k] - b[k] for a, b in zip(found["with tags"], found["without"])]
            print(what, f"difference, median {statistics.median(differences):.2f} mean {statistics.fmean(differences):.2f} ms", flush=True)


if __name__ == "__main__":
    from ranks import run_ranks
    run_ranks(work, tempfile.mkdtemp(), world=2, gpus=torch.cuda.is_available())
