"""measure_speed: tokens a second of a model, reading a prompt and writing one token at a time, by batch."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.evaluation.outputs import is_causal, vocabulary_of
from bigq.measuring.gpu_memory import peak_nbytes, reset_peak
from bigq.measuring.reading import Reading, read_call

__all__ = ["Speed", "measure_speed"]

_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model is with one batch.

    Args:
        batch: sequences at once.
        prompt_tokens: of each sequence, read at once.
        prefill: tokens a second of all sequences, while the prompt is read.
        decode: tokens a second of all sequences, while each writes one token after the other with a KV cache; None for
            a model that does not write tokens.
        peak_nbytes: most bytes of tensors on the GPU at once, with the model's own; None on a CPU, where torch does not
            count them.
    """

    batch: int
    prompt_tokens: int
    prefill: Reading
    decode: Reading | None
    peak_nbytes: int | None

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON can hold them."""
        return asdict(self)


def measure_speed(
    model: nn.Module,
    batches: Sequence[int],
    device: torch.device,
    *,
    prompt_tokens: int,
    new_tokens: int,
) -> tuple[Speed, ...]:
    """Measure eager calls of a model of transformers with random token ids.

    Args:
        model: in eval mode; see `refusal_of`.
        batches: sequences at once, one after the other.
        device: that the model runs on; it is waited for.
        prompt_tokens: of each sequence.
        new_tokens: that each sequence writes, in each of three measurements.
    """
    return tuple(_of_batch(model, batch, device, prompt_tokens, new_tokens) for batch in batches)


def _of_batch(model: Any, batch: int, device: torch.device, prompt_tokens: int, new_tokens: int) -> Speed:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_of(model) or 1, (batch, prompt_tokens), generator=generator).to(device)
    inputs = _inputs(model)
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    reset_peak(device)
    last: dict[str, Any] = {}

    def prefill() -> None:
        last.clear()  # one cache at a time
        last["out"] = model(input_ids=ids, **inputs)

    decode = None
    with torch.no_grad():
        read = read_call(prefill, device, repeats=_REPEATS)
        if is_causal(model):
            out = last.pop("out")
            decode = _decode(model, out, device, batch, new_tokens, inputs)
        last.clear()
    return Speed(
        batch=batch,
        prompt_tokens=prompt_tokens,
        prefill=_rate(read, batch * prompt_tokens),
        decode=decode,
        peak_nbytes=peak_nbytes(device),
    )


def _decode(
    model: Any, out: Any, device: torch.device, batch: int, new_tokens: int, inputs: dict[str, Any]
) -> Reading | None:
    """Tokens a second of the sequences that go on from `out`; None if the model gave no cache."""
    state: dict[str, Any] = {"cache": getattr(out, "past_key_values", None), "ids": _next(out.logits)}
    if state["cache"] is None:
        return None

    def write() -> None:
        for _ in range(new_tokens):
            out = model(input_ids=state["ids"], past_key_values=state["cache"], **inputs)
            state.update(cache=out.past_key_values, ids=_next(out.logits))

    return _rate(read_call(write, device, repeats=_REPEATS), batch * new_tokens)


def _next(logits: Tensor) -> Tensor:
    return logits[:, -1:].argmax(-1)


def _inputs(model: Any) -> dict[str, Any]:
    """Arguments beside the token ids: a cache, and the logits of the last token alone, as `generate` asks for them."""
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"use_cache": True} if is_causal(model) else {}
    if "logits_to_keep" in names:
        inputs["logits_to_keep"] = 1
    return inputs


def _rate(seconds: Reading, tokens: int) -> Reading:
    return Reading(value=tokens / seconds.value, spread=seconds.spread)
