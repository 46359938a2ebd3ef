"""loads.py FOLDER: seconds and peaks of loading 8B in bf16, in FP8 blocks and 20B of experts in MXFP4, each to nf4."""

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model

LAYERS, FP8 = 32, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
SHAPES |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        rows = [nn.ModuleDict({n: nn.Linear(k, m, bias=False) for n, (m, k) in SHAPES.items()}) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(rows)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(32, 2880, 5760))
        self.down = nn.Parameter(torch.empty(32, 2880, 2880))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(24))


def write(folder: Path) -> None:
    g = torch.Generator(device="cuda").manual_seed(0)
    for kind in ("bf16", "fp8", "mxfp4"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for kind in ("bf16", "fp8"):
        for first in range(0, LAYERS, 8):
            tensors = {}
            for layer in range(first, first + 8):
                for name, (n, k) in SHAPES.items():
                    w, key = torch.randn(n, k, device="cuda", generator=g) * 0.02, f"layers.{layer}.{name}.weight"
                    if kind == "bf16":
                        tensors[key] = w.bfloat16().cpu()
                    else:
                        tensors[key] = (w * 2000).clamp(-440, 440).to(torch.float8_e4m3fn).cpu()
                        tensors[f"{key}_scale_inv"] = torch.full((n // 128, k // 128), 1 / 2000)
            save_file(tensors, folder / kind / f"model-{first // 8 + 1:05d}-of-00004.safetensors")
    (folder / "fp8" / "config.json").write_text(json.dumps(FP8))
    for part in range(4):
        tensors = {}
        for layer in range(part * 6, part * 6 + 6):
            for name, (n, k) in {"up": (5760, 2880), "down": (2880, 2880)}.items():
                shape = (32, n, k // 32, 16)
                codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=g).cpu()
                tensors[f"layers.{layer}.{name}_blocks"] = codes
                tensors[f"layers.{layer}.{name}_scales"] = torch.full(shape[:-1], 120, dtype=torch.uint8)
        save_file(tensors, folder / "mxfp4" / f"model-{part + 1:05d}-of-00004.safetensors")


def main() -> None:
    folder = Path(sys.argv[1])
    write(folder)
    for kind, build, config in (
        ("bf16", Dense, QuantizationConfig("nf4", skip_defaults=False)),
        ("fp8", Dense, QuantizationConfig("nf4", skip_defaults=False)),
        ("mxfp4", Sparse, QuantizationConfig("nf4", also_quantize=["re:.*\\.(up|down)"])),
    ):
        for again in range(3):
            with init_empty_weights():
                model = build()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            load_and_quantize_model(model, folder / kind, config, {"": 0}, progress=False)
            torch.cuda.synchronize()
            row = {"kind": kind, "again": again, "s": round(time.perf_counter() - began, 3)}
            row |= {"peak": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
            row |= {"held": round(torch.cuda.memory_allocated() / 1e9, 2)}
            row |= {stage.name: round(stage.seconds, 3) for stage in model.quantization_report.stages}
            print(json.dumps(row), flush=True)
            del model


if __name__ == "__main__":
    main()
