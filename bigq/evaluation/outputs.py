"""Outputs: what a model computes for some windows of token ids, kept on the CPU for a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigq.errors import UnsupportedError

__all__ = ["Outputs", "is_causal", "outputs_of", "refusal_of", "vocabulary_of"]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model computes for windows of token ids.

    Args:
        values: of the first windows, [L, V] each, float32 on the CPU: logits, or hidden states of a model without.
        are_logits: whether V is the vocabulary.
        losses: of every window, the negative log likelihoods of its tokens after the first, [L - 1], float64, in nats;
            none if the model does not predict the next token.
    """

    values: tuple[Tensor, ...]
    are_logits: bool
    losses: tuple[Tensor, ...]


def refusal_of(model: nn.Module, device: torch.device) -> str | None:
    """Why `model`, which runs on `device`, cannot be called with token ids alone; None if it can. It is tried."""
    takes = getattr(model, "main_input_name", "other inputs")
    if takes != "input_ids" or vocabulary_of(model) is None:
        return f"it takes {takes}"
    try:
        _call(model, torch.zeros(2, dtype=torch.int64, device=device))
    except (AttributeError, TypeError, ValueError, UnsupportedError) as error:
        return f"a call with token ids raises {type(error).__name__}: {error}"
    return None


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids a model of transformers knows."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def is_causal(model: nn.Module) -> bool:
    """Whether `model` is one of transformers that predicts the next token from those before it."""
    known: Any = model
    config = getattr(model, "config", None)
    return bool(
        hasattr(model, "can_generate") and known.can_generate() and not getattr(config, "is_encoder_decoder", False)
    )


def outputs_of(model: nn.Module, windows: Sequence[Tensor], device: torch.device, kept_tokens: int) -> Outputs:
    """Call `model` with one window after the other, without gradients.

    Args:
        model: of transformers, in eval mode; see `refusal_of`.
        windows: token ids, int64 [L] each.
        device: that the model runs on.
        kept_tokens: the values of whole windows are kept until they are as many tokens; those of the first one always.

    Raises:
        UnsupportedError: the model returns neither logits nor hidden states of one vector a token, or holds NaN.
    """
    values: list[Tensor] = []
    losses: list[Tensor] = []
    are_logits, kept = False, 0
    for window in windows:
        found, are_logits = _call(model, window.to(device))
        if not found.isfinite().all():
            raise UnsupportedError(
                f"{type(model).__name__} computes NaN or Inf for {len(window)} tokens in {_dtype(model)}: "
                "pass a dtype with a wider range, such as bfloat16 or float32"
            )
        if is_causal(model) and are_logits:
            nats = F.cross_entropy(found[:-1], window[1:].to(found.device), reduction="none")
            losses.append(nats.double().cpu())
        if not values or kept + len(window) <= kept_tokens:
            values.append(found.cpu())
            kept += len(window)
    return Outputs(values=tuple(values), are_logits=are_logits, losses=tuple(losses))


def _call(model: nn.Module, window: Tensor) -> tuple[Tensor, bool]:
    """The values of one window, [L, V] in float32, and whether they are logits."""
    ids = window[None]
    inputs = {"input_ids": ids, "use_cache": False} if is_causal(model) else {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        out = model(**inputs)
    found = getattr(out, "logits", None)
    are_logits = isinstance(found, Tensor) and found.ndim == 3 and found.shape[-1] >= (vocabulary_of(model) or 0)
    if not isinstance(found, Tensor):
        found = getattr(out, "last_hidden_state", None)
    if not isinstance(found, Tensor) or found.shape[0] != 1:
        raise UnsupportedError(f"{type(model).__name__} returns {type(out).__name__} without logits or hidden states")
    return found[0].float().reshape(-1, found.shape[-1]), are_logits


def _dtype(model: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
