"""Fine-tune a causal language model on a text: LoRA adapters on frozen weights in 4 or 8 bits, merged at the end."""

import argparse
import math
import warnings
from pathlib import Path

import torch

import bigq
from bigq.integrations.peft import merge_costs

try:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from bigq.integrations.transformers import use_as_bitsandbytes
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install -c constraints.txt -e '.[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text", type=Path, help="a text file, of which the last tenth is held out")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder or Hub repository")
parser.add_argument("--format", choices=["nf4", "fp4", "int8"], default="nf4")
parser.add_argument("--output", type=Path, default=Path("qlora"), help="folder for the adapter and the merged model")
parser.add_argument("--steps", type=int, default=200, help="of 8 rows of 128 tokens")
args = parser.parse_args()


def train(name, model, steps):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(1, steps + 1):
        batch = training[torch.randint(len(training), (8,))].to(device)
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if steps > 2 and (step == 1 or step % 50 == 0):
            print(f"loss at step {step:<14}{loss.item():>9.3f}")
    if device == "cuda":
        print(f"GPU memory, {name:<15}{torch.cuda.max_memory_allocated() / 1e6:>9.0f} MB")


@torch.no_grad()
def show_perplexity(name, model):
    losses = [model.eval()(input_ids=row[None], labels=row[None]).loss for row in held_out.to(device)]
    print(f"perplexity, {name:<15}{math.exp(sum(losses).item() / len(losses)):>9.2f}")


warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT uses names that transformers has renamed
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(args.text.read_text(encoding="utf-8"))["input_ids"])
rows = ids[: len(ids) // 128 * 128].view(-1, 128)
training, held_out = rows[: -len(rows) // 10], rows[-len(rows) // 10 :][:100]
lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
with torch.device("meta"):
    skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
# In bitsandbytes' layout a row is a whole number of blocks. A block has 64 numbers.
uneven = [name for name, m in skeleton.named_modules() if getattr(m, "in_features", 64) % 64 and args.format != "int8"]
config = bigq.QuantizationConfig(args.format, skip_modules=uneven)

if device == "cuda":  # the memory of two steps of other kinds of training
    half = {"dtype": torch.float16, "device_map": 0}
    train("fp16, full", AutoModelForCausalLM.from_pretrained(args.model, **half), 2)
    train("fp16, LoRA", peft.get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, **half), lora), 2)
base = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
show_perplexity(args.format, base)
model = peft.get_peft_model(base, lora)
train(f"{args.format}, LoRA", model, args.steps)
show_perplexity("with adapter", model)
model.save_pretrained(args.output / "adapter")
worst = max(merge_costs(model).values(), key=lambda cost: cost.rounding)
print(f"a merge adds up to         {worst.rounding:>9.2%} of rounding to {worst.change:.2%} of change")
bigq.save_quantized(model.merge_and_unload(), args.output / "merged", layout="bitsandbytes")
use_as_bitsandbytes()  # without this call, transformers loads the folder with bitsandbytes
show_perplexity("merged", AutoModelForCausalLM.from_pretrained(args.output / "merged"))
