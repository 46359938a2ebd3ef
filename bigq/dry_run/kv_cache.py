"""measure_cache: the bytes of the cache of keys and values, from the shapes that the model's own code gives it.

The model runs on the meta device, where no numbers exist. So the shapes are those of the installed transformers, also
with sliding windows, with latent keys and values (MLA) and with the states of linear attention.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigq.interop.transformers_model import is_transformers_model

__all__ = ["LayerCache", "Unknown", "measure_cache"]

_LENGTHS = (2, 3)  # tokens of the runs: within any window
_LINEAR = {  # the kinds of layers of a cache that grow by a constant for each token, up to a window, or not at all
    "DummyLayer",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionLayer",
}


class Unknown(NamedTuple):
    """What cannot be said, and why."""

    reason: str


class LayerCache(NamedTuple):
    """The cache of one layer for one sequence: `constant` bytes, and `slope` bytes for each token that it keeps.

    It keeps the last `window` tokens; None: all.
    """

    constant: int
    slope: int
    window: int | None

    def nbytes(self, context: int) -> int:
        """Bytes while tokens are generated, `context` tokens after the first one."""
        return self.constant + self.slope * min(context, self.window or context)

    def prompt_nbytes(self, context: int) -> int:
        """Bytes after a prompt of `context` tokens: transformers keeps all of them until the next token."""
        return self.constant + self.slope * context


def measure_cache(model: nn.Module, dtype: torch.dtype) -> list[LayerCache] | Unknown:
    """The cache of each layer of a model of transformers for one sequence; none if the model does not generate.

    Args:
        model: a skeleton. It is copied, and not changed.
        dtype: of the activations.
    """
    if not is_transformers_model(model):
        return Unknown("only models of transformers say what they cache")
    known: Any = model
    if known.config.is_encoder_decoder:
        return Unknown("an encoder-decoder also caches keys and values of its input, whose length is not given")
    if not known.can_generate():
        return []
    has_experts = any(parameter.dim() > 2 for parameter in model.parameters())
    run_dtype = torch.bfloat16 if has_experts else dtype  # grouped products of experts are for bfloat16 alone
    try:
        copy = deepcopy(model).to(device="meta", dtype=run_dtype)
        runs = [_run(copy, length, run_dtype, dtype) for length in _LENGTHS]
    except Exception as error:  # whatever the code of a model raises on meta
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Unknown(f"{type(model).__name__} does not run on the meta device ({said[:200]})")
    layers = []
    for index, seen in enumerate(zip(*runs, strict=True)):
        (kind, window, first), (*_, second) = seen
        if kind not in _LINEAR:
            return Unknown(f"layer {index} of {type(model).__name__} has a cache that is a {kind}")
        layers.append(LayerCache(first - _LENGTHS[0] * (second - first), second - first, window))
    return layers


def _run(model: Any, length: int, run_dtype: torch.dtype, dtype: torch.dtype) -> list[tuple[str, int | None, int]]:
    """(kind, window, bytes) of the cache of each layer after one sequence of `length` tokens."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.no_grad():
        made = model(input_ids=ids, use_cache=True)
    cache = getattr(made, "past_key_values", None)
    found = []
    for layer in (made.cache_params if cache is None else cache).layers:
        nbytes = 0
        for tensor in _tensors(vars(layer)):
            if tensor.dim() > 1:  # others count tokens
                if run_dtype not in (dtype, tensor.dtype):
                    raise TypeError(f"its states are {tensor.dtype}")
                own = dtype if tensor.dtype == run_dtype else tensor.dtype
                nbytes += tensor.numel() * own.itemsize
        window = getattr(layer, "sliding_window", None)
        found.append((type(layer).__name__, window if isinstance(window, int) else None, nbytes))
    return found


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in an attribute of a cache."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
