"""Run karpathy's minGPT, unmodified, on GPT-2 XL's weights in 4 and in 8 bits."""

import argparse
import sys
import time
from pathlib import Path

import accelerate
import torch

import bigq

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--weights", default="marcsun13/gpt2-xl-linear-sharded", help="a file, folder or Hub repository")
parser.add_argument("--format", nargs="+", choices=["nf4", "fp4", "int8"], default=["nf4", "int8"])
parser.add_argument("--model-type", choices=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], default="gpt2-xl")
parser.add_argument("--sizes", nargs=3, type=int, metavar=("LAYERS", "HEADS", "WIDTH"), help="in place of a type")
parser.add_argument("--vocab-size", type=int, default=50257)
parser.add_argument("--block-size", type=int, default=1024)
parser.add_argument("--prompt", help="text, for which minGPT downloads GPT-2's vocabulary")
parser.add_argument("--prompt-ids", nargs="+", type=int, default=[15496, 11, 616, 1438, 318], help="without --prompt")
args = parser.parse_args()

own_folder = Path(__file__).resolve().parent  # where "mingpt" is this script
sys.path[:] = [path for path in sys.path if Path(path).resolve() != own_folder]
try:
    from mingpt.model import GPT
except ModuleNotFoundError:
    sys.exit("minGPT is missing: pip install git+https://github.com/karpathy/minGPT")
if args.prompt:
    try:
        from mingpt.bpe import BPETokenizer

        tokenizer = BPETokenizer()
    except (ImportError, OSError) as error:
        sys.exit(f"--prompt needs regex, requests and a network, --prompt-ids does not: {error}")
    args.prompt_ids = tokenizer(args.prompt)[0].tolist()
if max(args.prompt_ids) >= args.vocab_size:
    parser.error(f"--prompt-ids goes up to {args.vocab_size - 1}")

for name in args.format:
    config = GPT.get_default_config()
    config.vocab_size, config.block_size, config.model_type = args.vocab_size, args.block_size, args.model_type
    if args.sizes:
        config.model_type, config.n_layer, config.n_head, config.n_embd = None, *args.sizes
    with accelerate.init_empty_weights():
        model = GPT(config).eval()
    before = bigq.memory_footprint(model).total_nbytes
    half = bigq.QuantizationConfig(name, dtype=torch.float16, cast_buffers=True)
    start = time.perf_counter()
    try:
        bigq.load_and_quantize_model(model, args.weights, half)
    except bigq.BigqError as error:
        sys.exit(f"--weights {args.weights}: {error}")
    print(f"{name}: {before / 1e6:.1f} MB of fp32, loaded in {time.perf_counter() - start:.1f} s as")
    print(bigq.memory_footprint(model).table())
    ids = model.generate(torch.tensor([args.prompt_ids]).to(model.lm_head.weight.device), max_new_tokens=20)[0]
    print(tokenizer.decode(ids) if args.prompt else ids.tolist(), end="\n\n")
