"""Four layers of the model as float32, float16 and bfloat16 safetensors and as a zipped .bin of bfloat16: few.py FOLDER."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint

base, began = Path(sys.argv[1]), time.time()
checkpoint.make(base / "bfloat16")
torch.manual_seed(0)
device = "cpu" if checkpoint.TINY else "cuda"
tensors = {n: torch.ones(s, dtype=torch.bfloat16) if len(s) == 1 else (torch.randn(s, device=device, dtype=torch.bfloat16) * 0.02).cpu()
           for n, s in checkpoint.names()}
config = (base / "bfloat16" / "config.json").read_text()


def write(kind):
    folder = base / kind
    folder.mkdir()
    (folder / "config.json").write_text(config)
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        dtype = getattr(torch, kind)
        save_file({n: t.to(device).to(dtype).cpu() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "WRITTEN").write_text("")


with ThreadPoolExecutor(3) as pool:
    list(pool.map(write, ("float32", "float16", "bin")))
print({k.name: round(sum(e.stat().st_size for e in os.scandir(k)) / 1e9, 2) for k in base.iterdir()}, round(time.time() - began, 1), "s")
