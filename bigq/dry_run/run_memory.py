"""run_memory: what a model needs beside its weights while it generates or while adapters on it are trained."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from bigq.dry_run.blocks import LinearShape, find_blocks
from bigq.dry_run.kv_cache import LayerCache, Unknown, measure_cache
from bigq.dry_run.load_plan import LoadPlan
from bigq.dry_run.memory_estimate import MemoryItem
from bigq.interop.transformers_model import is_transformers_model
from bigq.model.selection import output_head
from bigq.weight.convert import is_transposed_linear

__all__ = ["RunMemory"]

_FLOAT32 = 4  # bytes


class RunMemory:
    """The memory of `batch` sequences of `context` tokens beside the weights of `model`, a skeleton.

    Args:
        model: its blocks are found, and its cache is measured once.
        resident: a plan of it, for the dtypes and formats of its weights.
    """

    def __init__(self, model: nn.Module, resident: LoadPlan, *, batch: int, context: int) -> None:
        self._model, self._resident, self._batch, self._context = model, resident, batch, context
        self.dtype = _activation_dtype(model, resident)
        self._blocks = find_blocks(model)
        self._cache: list[LayerCache] | Unknown = measure_cache(model, self.dtype)
        self._generates = isinstance(self._cache, Unknown) or bool(self._cache)
        config: Any = getattr(model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        top_k = getattr(text, "num_experts_per_tok", None)
        self._top_k = top_k if isinstance(top_k, int) else None
        self._is_grouped = getattr(text, "_experts_implementation", None) == "grouped_mm"
        self._is_eager = getattr(text, "_attn_implementation", None) == "eager"
        head = output_head(model)
        shape = None if head is None else getattr(head, "weight", torch.empty(0)).shape
        self._vocabulary = shape[0] if shape is not None and len(shape) == 2 else None

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self._batch * self._context

    def generate(self, plan: LoadPlan) -> list[MemoryItem]:
        """The items of generating after a prompt, on the devices that run the blocks under `plan`."""
        where = self._devices(plan)
        return [*self._cache_items(where), *self._prefill_items(plan, where), *self._scratch("generate", where)]

    def train(self, plan: LoadPlan, rank: int) -> list[MemoryItem]:
        """The items of training LoRA adapters of `rank` on every linear but the output head."""
        where = self._devices(plan)
        linears = _linears(self._model)
        by_device: dict[str, int] = {}
        device_of = {tensor.name: tensor.device for tensor in plan.tensors}
        for linear in linears:
            stored = device_of.get(f"{linear.name}.weight", plan.runs_on)
            device = stored if stored.startswith("cuda") else plan.runs_on
            by_device[device] = by_device.get(device, 0) + rank * (linear.n + linear.k)
        items = []
        for device, count in by_device.items():
            made = f"{count:,} parameters = the sum of {rank} x (N + K) over {len(linears)} linears"
            for name, size, words in (
                ("adapters", 4, "in float32, as PEFT keeps them: 4 bytes each"),
                ("gradients", 4, "in float32: 4 bytes each"),
                ("optimizer", 8, "two states of AdamW in float32: 8 bytes each"),
            ):
                items.append(
                    MemoryItem(
                        name=name,
                        phase="train",
                        device=device,
                        nbytes=size * count,
                        how=f"{made}; {words}",
                        is_exact=True,
                    )
                )
        return [*items, *self._training_items(plan, where), *self._scratch("train", where)]

    def _devices(self, plan: LoadPlan) -> list[str]:
        """The device that runs each block."""
        found = []
        for block in self._blocks:
            stored = [t.device for t in plan.tensors if any(name.startswith(f"{block.name}.") for name in t.names)]
            found.append(next((device for device in stored if device.startswith("cuda")), plan.runs_on))
        return found or [plan.runs_on]

    def _item(
        self, name: str, phase: str, device: str, nbytes: int | None, how: str, *, is_exact: bool = False
    ) -> MemoryItem:
        return MemoryItem(name=name, phase=phase, device=device, nbytes=nbytes, how=how, is_exact=is_exact)

    def _cache_items(self, where: Sequence[str]) -> list[MemoryItem]:
        if isinstance(self._cache, Unknown):
            why = self._cache.reason
            return [self._item("KV cache", "generate", device, None, why) for device in dict.fromkeys(where)]
        if not self._cache:
            return []
        devices = where if len(where) == len(self._cache) else [where[0]] * len(self._cache)
        kept: dict[str, int] = {}
        more: dict[str, int] = {}
        for layer, device in zip(self._cache, devices, strict=True):
            now, after = layer.nbytes(self._context), layer.prompt_nbytes(self._context)
            kept[device] = kept.get(device, 0) + self._batch * now
            more[device] = more.get(device, 0) + self._batch * (after - now)
        how = (
            f"{len(self._cache)} layers, {self._batch} x {self._context:,} tokens in {_name(self.dtype)}: the shapes "
            "that the model's own code gives it on the meta device"
        )
        prompt = "layers with a sliding window keep the whole prompt until the next token"
        return [
            *(self._item("KV cache", "generate", device, n, how, is_exact=True) for device, n in kept.items()),
            *(
                self._item("KV cache of the prompt", "generate", device, n, prompt, is_exact=True)
                for device, n in more.items()
                if n
            ),
        ]

    def _prefill_items(self, plan: LoadPlan, where: Sequence[str]) -> list[MemoryItem]:
        reason = self._why_unknown()
        devices = dict.fromkeys(where)
        if reason is not None:
            return [self._item("activations", "generate", device, None, reason) for device in devices]
        hidden = self._hidden()
        parts = [part for block in self._blocks for part in block.widths(self._top_k or 1)]
        width = max(part.outputs + part.widest_output for part in parts)
        size = self.dtype.itemsize
        how = (
            f"of the prompt: {self.tokens:,} tokens x (4 x {hidden} + {width}) x {size} bytes; 4 x hidden size for the "
            "residual and a norm in float32, then the outputs of the linears of the widest part of a block, and the "
            "widest output once more; attention that keeps no scores"
        )
        items = [
            self._item("activations", "generate", device, self.tokens * (4 * hidden + width) * size, how)
            for device in devices
        ]
        if self._vocabulary is not None:
            rows, words = (self._batch, "of the last token") if self._generates else (self.tokens, "of every token")
            how = f"{words}: {rows:,} x {self._vocabulary:,} x ({size} + 4) bytes, one copy in float32"
            nbytes = rows * self._vocabulary * (size + _FLOAT32)
            items.append(self._item("logits", "generate", plan.runs_on, nbytes, how))
        return items

    def _training_items(self, plan: LoadPlan, where: Sequence[str]) -> list[MemoryItem]:
        reason = self._why_unknown()
        devices = dict.fromkeys(where)
        if reason is not None:
            return [self._item("activations", "train", device, None, reason) for device in devices]
        hidden, size = self._hidden(), self.dtype.itemsize
        widths = [
            sum(2 * part.outputs for part in block.widths(self._top_k or 1))
            + 3 * max(part.widest_input for part in block.widths(self._top_k or 1))
            for block in self._blocks
        ]
        one = self.tokens * (12 * hidden + max(widths)) * size
        logits = 0 if self._vocabulary is None else self.tokens * self._vocabulary * (size + size + 2 * _FLOAT32)
        items = []
        for device in devices:
            count = list(where).count(device) if len(where) == len(self._blocks) else len(self._blocks)
            has_logits = device == plan.runs_on and logits > one
            how = (
                f"gradient checkpointing: the input of each of {count} blocks, {self.tokens:,} tokens x {hidden} x "
                f"{size} bytes, then the larger of one block, {self.tokens:,} x (12 x {hidden} + {max(widths)}) x "
                f"{size} (two norms in float32, twice the outputs of its linears, three times its widest input), and "
                f"the logits, {self.tokens:,} x {self._vocabulary or 0:,} x {2 * size + 2 * _FLOAT32} (they and their "
                f"gradient in {_name(self.dtype)} and in float32); attention that keeps no scores"
            )
            nbytes = count * self.tokens * hidden * size + (logits if has_logits else one)
            items.append(self._item("activations", "train", device, nbytes, how))
        return items

    def _scratch(self, phase: str, where: Sequence[str]) -> list[MemoryItem]:
        """The weight that is decoded for a product with many tokens, or for a gradient."""
        quantized = [tensor for tensor in self._resident.tensors if tensor.is_quantized]
        if phase == "generate":  # int8 is multiplied as it is
            quantized = [tensor for tensor in quantized if "block_size" in tensor.settings]
        if not quantized:
            return []
        devices = dict.fromkeys(where)
        stacked = any(len(tensor.shape) > 2 for tensor in quantized)
        if stacked and not self._is_grouped:
            how = "how many experts are decoded at once depends on how the model multiplies them"
            return [self._item("decoded weight", phase, device, None, how) for device in devices]
        largest = max(prod(tensor.shape[-2:]) for tensor in quantized)
        how = (
            f"the largest quantized weight, {largest:,} numbers, in {_name(self.dtype)}: products of 4-bit weights "
            f"with more than 16 to 128 tokens, and gradients, may decode a weight{' of one expert' if stacked else ''}"
        )
        return [self._item("decoded weight", phase, device, largest * self.dtype.itemsize, how) for device in devices]

    def _hidden(self) -> int:
        """The width of the residual: the input width that most linears of the blocks have."""
        inputs = [linear.k for block in self._blocks for part in block.parts for linear in part]
        return max(set(inputs), key=inputs.count)

    def _why_unknown(self) -> str | None:
        """Why activations are unknown; None if they are known."""
        known: Any = self._model
        if not is_transformers_model(self._model) or known.main_input_name != "input_ids":
            return "how many tokens the model makes of its input is not known: its input is no text of transformers"
        if known.config.is_encoder_decoder:
            return "an encoder and a decoder run, and the length of one of them is not given"
        if not isinstance(self._cache, Unknown) and any(layer.constant for layer in self._cache):
            return "its layers keep states, such as those of linear attention, for which there is no formula"
        if not any(block.parts for block in self._blocks):
            return "the model has no list of blocks with linears"
        if self._is_eager:
            return "its attention keeps the scores of all pairs of tokens (attn_implementation='eager')"
        if self._top_k is None and any(block.has_experts for block in self._blocks):
            return "its config does not say how many experts run for a token"
        return None


def _activation_dtype(model: nn.Module, resident: LoadPlan) -> torch.dtype:
    """The dtype of activations: that of the largest kept parameter, such as the embedding, after the load."""
    kept = [
        tensor
        for tensor in resident.tensors
        if not tensor.is_quantized and not tensor.is_buffer and tensor.format in ("float32", "float16", "bfloat16")
    ]
    if not kept:
        return torch.get_default_dtype()
    found: torch.dtype = getattr(torch, max(kept, key=lambda tensor: tensor.numel).format)
    return found


def _linears(model: nn.Module) -> list[LinearShape]:
    """The linears that PEFT's target_modules="all-linear" adapts: all but the output head."""
    head = output_head(model)
    found = []
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            found.append(LinearShape(name, module.out_features, module.in_features))
        elif is_transposed_linear(module):
            k, n = module.weight.shape
            found.append(LinearShape(name, int(n), int(k)))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
