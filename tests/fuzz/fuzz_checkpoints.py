"""Mutate checkpoints and load them: each is refused by bigq, or loads as what it then says. Anything else is a finding.

    PYTHONPATH=.:triton_kernels python tests/fuzz/fuzz_checkpoints.py --count 60000
    PYTHONPATH=.:triton_kernels python tests/fuzz/fuzz_checkpoints.py --start 1234 --count 1

A case is made from the seed and its number alone, so the second line repeats one. A sample runs in the suite.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from bigq import BigqError, QuantizationConfig, QuantizedLinear, load_and_quantize_model
from bigq.formats import decode_quant_state

CONFIG = QuantizationConfig("nf4", block_size=32)
LONGEST_MESSAGE = 20_000  # characters
Tensors = Mapping[str, Tensor]
ODD: list[Any] = [  # what a field of a file may say instead
    None, True, False, 0, -1, 1, 32.0, 63, 2**31, 2**63, 2**64, 10**30, 1e300, float("inf"), float("nan"), "", "nf4",
    "_inductor", "../x", "a" * 3000, "\0", "\ud800", [], {}, [[]], [0], [-1], [2**62, 4], [2**63, 0], ["a"], {"a": {}},
]  # fmt: skip


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False), nn.Linear(4, 3))


@cache
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in build().state_dict().items()}


@cache
def quantized(form: str) -> dict[str, Tensor]:
    """What bigq saves of the model."""
    settings: dict[str, Any] = {"block_size": 32, "double_quant": True} if form == "fp4" else {}
    model = build()
    model.load_state_dict(weights())
    load_and_quantize_model(model, None, QuantizationConfig(form, **settings), "cpu", progress=False)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Mutations


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few flipped, cut, inserted, repeated or replaced bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 2, 8, 64))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= rng.randint(1, 255)
            case 1:
                data[at : at + 1] = rng.choice(b'0123456789,[]"{}:').to_bytes(1, "big")
            case 2:
                data[at:at] = rng.randbytes(size)
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size]
            case 5 if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


def mutated_json(content: Any, rng: random.Random) -> bytes:
    """JSON with a value, a key or a whole entry that is another, or given twice."""
    content = json.loads(json.dumps(content))
    holders = [content]
    for holder in holders:
        values = list(holder.values()) if isinstance(holder, dict) else holder
        holders += [value for value in values if isinstance(value, dict | list) and value]
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    match rng.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(rng.choice(ODD))] = holder.pop(key)
        case 2 if isinstance(holder, dict):
            text = json.dumps(content)
            entry = json.dumps({key: rng.choice([holder[key], rng.choice(ODD)])})[1:-1]
            return text.replace("{", "{" + entry + ",", 1).encode()
        case _:
            holder[key] = rng.choice(ODD)
    return json.dumps(content).encode()


def mutated_object(content: Any, rng: random.Random) -> Any:
    """A state dict with other objects, views, names or levels."""
    content = dict(content)
    name = rng.choice(list(content))
    tensor = content[name]
    match rng.randrange(10):
        case 0:
            content[name] = rng.choice([*ODD, object, (), {1}])
        case 1:
            content[rng.choice([*[odd for odd in ODD if not isinstance(odd, dict | list)], (((),),)])] = content.pop(
                name
            )
        case 2:
            content = {rng.choice(["state_dict", "model", 3]): content, "epoch": rng.choice(ODD)}
        case 3:
            content = {"a": content, rng.choice(["b", "ema"]): dict(content)}
        case 4:
            content[name] = torch._neg_view(tensor.clone())
        case 5:
            content[name] = tensor.to(rng.choice([torch.float16, torch.int64, torch.complex64, torch.float8_e4m3fn]))
        case 6:
            content[name] = tensor.to_sparse()
        case 7:
            content[name] = tensor.repeat(2, *[1] * (tensor.dim() - 1))[::2]
        case 8:
            content[name] = tensor.to("meta")
        case 9:
            content[name] = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.flip(0)
    return content


def mutated_archive(content: bytes, rng: random.Random) -> bytes:
    """A zip of torch.save with one record changed, cut, lost, repeated, compressed or moved."""
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        records = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    at = rng.randrange(len(records))
    if rng.random() < 0.5:
        at = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    name, data = records[at]
    packed = zipfile.ZIP_STORED
    match rng.randrange(8):
        case 0:
            records[at] = name, data[: rng.randrange(len(data) + 1)]
        case 1:
            records[at] = name, data + rng.randbytes(rng.choice((1, 4, 64)))
        case 2:
            del records[at]
        case 3:
            packed = zipfile.ZIP_DEFLATED
        case 4:
            rng.shuffle(records)
        case 5:
            records[at] = rng.choice(records)[0] + rng.choice(("", "x")), data
        case _:
            records[at] = name, mutated_bytes(data, rng)
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as new:
        warnings.simplefilter("ignore")  # of a name given twice
        for i, (record, held) in enumerate(records):
            new.writestr(record, held, packed if i == at else zipfile.ZIP_STORED)
    return stream.getvalue()


# Cases: what is written, and what another library reads from it


def _saved(content: object, is_zip: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def _with_header(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    header = mutated_json(json.loads(header), rng) if rng.random() < 0.5 else mutated_bytes(header, rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _with_record(tensors: Tensors, rng: random.Random) -> bytes:
    """A quantized checkpoint of which a quant_state is another."""
    tensors = dict(tensors)
    name = rng.choice([name for name in tensors if name.endswith("quant_state")])
    record = bytes(tensors[name].tolist()).rstrip()
    text = mutated_json(json.loads(record), rng) if rng.random() < 0.7 else mutated_bytes(record, rng)
    text = text.ljust(rng.choice((256, 256, 256, 255, 512)))
    dtype = torch.uint8 if rng.random() < 0.9 else torch.int16
    tensors[name] = torch.tensor(list(text), dtype=dtype)
    return safetensors.torch.save(tensors)


def _load_pickle(content: bytes) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    while not any(isinstance(value, Tensor) and value.dim() for value in held.values()):
        held = next(value for value in held.values() if isinstance(value, dict))
    return held  # type: ignore[no-any-return]


def make_case(kind: str, folder: Path, rng: random.Random) -> tuple[Path, Callable[[], Tensors]]:
    """Write a mutated checkpoint of `kind`; the location to load, and a function that gives the tensors it holds."""
    if kind == "index":
        files: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
        for position, (name, tensor) in enumerate(weights().items()):
            files["ab"[position % 2] + ".safetensors"][name] = tensor
        for file, held in files.items():
            safetensors.torch.save_file(held, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        path = folder / "model.safetensors.index.json"
        changed = mutated_bytes(json.dumps(index).encode(), rng) if rng.random() < 0.3 else mutated_json(index, rng)
        path.write_bytes(changed)
        return rng.choice([path, folder]), weights
    if kind in ("safetensors", "header", "quantized", "record"):
        tensors = quantized(rng.choice(("nf4", "fp4", "int8"))) if kind in ("quantized", "record") else weights()
        content = safetensors.torch.save(dict(tensors))
        if kind == "record":
            content = _with_record(tensors, rng)
        elif kind == "safetensors":
            content = mutated_bytes(content, rng)
        else:
            content = _with_header(content, rng)
        path = folder / rng.choice(("model.safetensors", "model.safetensors", "blob", "m.ckpt"))
        path.write_bytes(content)
        return path, lambda: safetensors.torch.load(content)
    if kind == "objects":
        content = _saved(mutated_object(weights(), rng), is_zip=rng.random() < 0.7)
    elif kind == "archive":
        content = mutated_archive(_saved(rng.choice([weights(), {"model": weights()}])), rng)
    else:
        content = mutated_bytes(_saved(weights(), is_zip=kind == "zip"), rng)
    path = folder / rng.choice(("model.bin", "last.ckpt", "blob"))
    path.write_bytes(content)
    return path, lambda: _load_pickle(content)


KINDS = ("safetensors", "header", "quantized", "record", "index", "objects", "archive", "zip", "legacy")


# Outcomes


def check(kind: str, path: Path, stored: Callable[[], Tensors], rng: random.Random) -> str:
    """Load the checkpoint at `path`; "refused" or "loaded". Raises AssertionError where it is wrong."""
    with init_empty_weights():
        model = build()
    before = [type(module) for module in model.modules()]
    is_quantized = kind in ("quantized", "record")
    refusal = ""
    try:
        config = None if is_quantized else CONFIG
        load_and_quantize_model(model, path, config, "cpu", strict=rng.random() < 0.7, progress=False)
    except BigqError as error:
        refusal = str(error) or "a message of no characters"
    if refusal:
        assert len(refusal) < LONGEST_MESSAGE, f"a message of {len(refusal)} characters"
        assert [type(module) for module in model.modules()] == before, "a refusal changed the model"
        assert all(tensor.is_meta for tensor in model.parameters()), "a refusal left tensors in the model"
        return "refused"
    tensors = stored()
    for name, tensor in model.state_dict().items():
        wanted = _expected(model, name, tensors)
        if name.endswith("quant_state"):
            assert decode_quant_state(tensor, name) == decode_quant_state(wanted, name), name
        else:
            wanted = wanted.to_dense() if wanted.layout != torch.strided else wanted
            wanted = wanted.resolve_neg().resolve_conj().to(tensor.dtype)
            assert torch.equal(tensor.view(torch.uint8), wanted.contiguous().view(torch.uint8)), name
    return "loaded"


def _expected(model: nn.Module, name: str, tensors: Tensors) -> Tensor:
    if name in tensors:
        return tensors[name].detach()
    module, _, leaf = name.rpartition(".")
    layer = model.get_submodule(module)
    assert isinstance(layer, QuantizedLinear), f"{name} is not in the file"
    weight = tensors[f"{module}.weight"].detach()
    weight = weight.to_dense() if weight.layout != torch.strided else weight
    if weight.dtype.itemsize == 1:  # float8
        weight = weight.to(layer.weight.dtype)
    return layer.quantize(weight.resolve_neg())[leaf]


def run(numbers: range, seed: int = 0) -> Iterator[tuple[int, str, str]]:
    """(number, kind, outcome) of each case; an outcome that is neither "refused" nor "loaded" is a finding."""
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        kind = KINDS[number % len(KINDS)]
        with tempfile.TemporaryDirectory() as folder:
            path, stored = make_case(kind, Path(folder), rng)
            try:
                outcome = check(kind, path, stored, rng)
            except Exception:
                outcome = traceback.format_exc()
        yield number, kind, outcome


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutate checkpoints and load them.")
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[tuple[str, str]] = Counter()
    for number, kind, outcome in run(range(arguments.start, arguments.start + arguments.count), arguments.seed):
        outcomes[kind, outcome if outcome in ("refused", "loaded") else "FOUND"] += 1
        if outcome not in ("refused", "loaded"):
            print(f"case {number} ({kind}):\n{outcome}", flush=True)
        if (number + 1) % 1000 == 0:
            print(f"{number + 1}: {dict(sorted(outcomes.items()))}", flush=True)
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:12} {outcome:8} {count}")
    return 1 if any(outcome == "FOUND" for _, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
