"""compare_logits: how far the logits of a quantized model lie from those of its source, for the same tokens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import torch
from torch import Tensor

__all__ = ["LogitsError", "compare_logits"]


@dataclass(frozen=True, kw_only=True)
class LogitsError:
    """How far outputs lie from those of the source.

    Args:
        tokens: how many are compared.
        relative_error: root of the squared differences' sum over that of the source's squares.
        kl: mean over the tokens of the Kullback-Leibler divergence KL(source || quantized), in nats; None for hidden
            states, which are no logits.
        kl_standard_error: of that mean, with the tokens as independent.
        top1_agreement: share of the tokens for which both models find the same token the likeliest; None as above.
    """

    tokens: int
    relative_error: float
    kl: float | None = None
    kl_standard_error: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON can hold them."""
        return asdict(self)


def compare_logits(source: Sequence[Tensor], quantized: Sequence[Tensor], *, are_logits: bool = True) -> LogitsError:
    """Compare two models' outputs for the same windows.

    Args:
        source: float32 [L, V] for each window.
        quantized: as many, of the same shapes.
        are_logits: whether V is the vocabulary, so that a softmax over it means something.

    Example:
        >>> import torch
        >>> from bigq.evaluation.logits import compare_logits
        >>> logits = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> compare_logits([logits], [logits]).kl
        0.0
        >>> compare_logits([logits], [logits.flip(1)]).top1_agreement
        0.0
    """
    difference = size = 0.0
    divergences, agreeing, tokens = [], 0, 0
    for before, after in zip(source, quantized, strict=True):
        difference += (after - before).square().sum(dtype=torch.float64).item()
        size += before.square().sum(dtype=torch.float64).item()
        tokens += len(before)
        if are_logits:
            expected, got = before.log_softmax(1), after.log_softmax(1)
            divergences.append((expected.exp() * (expected - got)).sum(1, dtype=torch.float64))
            agreeing += int((before.argmax(1) == after.argmax(1)).sum())
    relative_error = sqrt(difference / size) if size else 0.0 if not difference else float("inf")
    if not are_logits:
        return LogitsError(tokens=tokens, relative_error=relative_error)
    kl = torch.cat(divergences)
    return LogitsError(
        tokens=tokens,
        relative_error=relative_error,
        kl=kl.mean().item(),
        kl_standard_error=(kl.std() / sqrt(tokens)).item() if tokens > 1 else None,
        top1_agreement=agreeing / tokens,
    )
