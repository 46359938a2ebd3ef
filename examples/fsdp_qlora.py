"""Fine-tune a causal language model on a text on 1 to n GPUs: FSDP2 shards its quantized weights and LoRA adapters.

torchrun --nproc-per-node 2 examples/fsdp_qlora.py text.txt --model HuggingFaceTB/SmolLM2-135M
"""

import argparse
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import bigq

try:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import bigq.integrations.transformers
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install -c constraints.txt -e '.[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text", type=Path, help="a text file, of which the last tenth is held out")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder or Hub repository")
parser.add_argument("--format", choices=["nf4", "fp4", "int8"], default="nf4")
parser.add_argument("--output", type=Path, default=Path("fsdp-qlora"), help="folder for the adapter and the model")
parser.add_argument("--steps", type=int, default=100, help="of 8 rows of 128 tokens, of all GPUs together")
args = parser.parse_args()


@torch.no_grad()
def show_loss(name):
    losses = [model.eval()(input_ids=row[None], labels=row[None]).loss.float() for row in held_out]
    say(f"held-out loss, {name:<14}{sum(losses).item() / len(losses):>9.4f}")


def say(line):
    if rank == 0:
        print(line, flush=True)


warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT uses names that transformers has renamed
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # each process makes the same adapter, and keeps its part
ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(args.text.read_text(encoding="utf-8"))["input_ids"])
rows = ids[: len(ids) // 128 * 128].view(-1, 128).to(device)
training, held_out = rows[: -len(rows) // 10], rows[-len(rows) // 10 :][:20]

config = bigq.QuantizationConfig(args.format)
base = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, dtype=torch.bfloat16)
model = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
descriptions = {p for name, p in model.named_parameters() if name.endswith("quant_state")}  # stay whole on each GPU
settings = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16), "ignored_params": descriptions}
for block in base.model.layers:
    fully_shard(block, **settings)
fully_shard(model, **settings)
say(f"megabytes on each GPU   {bigq.memory_footprint(model).total_nbytes / 1e6:>9.2f}")

show_loss(args.format)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, fused=True)
for _ in range(args.steps):
    batch = training[torch.randint(len(training), (8,))][rank::ranks]
    model.train()(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
show_loss("with adapter")
adapter = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    model.save_pretrained(args.output / "adapter", state_dict=adapter)
bigq.save_quantized(model.merge_and_unload(), args.output / "merged")  # in every process: each merges its rows
dist.destroy_process_group()
