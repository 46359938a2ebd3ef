"""compare_losses: the perplexity of two models on the same text, and the standard error of its change."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, sqrt

import torch
from torch import Tensor

from bigq.errors import ConfigError

__all__ = ["Perplexity", "compare_losses", "split_windows"]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well two models predict a text.

    Args:
        tokens: that are predicted: all but the first of each window.
        source_nats: mean negative log likelihood of a token, in nats, of the source.
        quantized_nats: that of the quantized model.
        change_nats: the second less the first.
        standard_error: of the change, from the differences token by token, with these as independent; None for a single
            token.
    """

    tokens: int
    source_nats: float
    quantized_nats: float
    change_nats: float
    standard_error: float | None

    @property
    def source(self) -> float:
        """The perplexity of the source: e to the power of its nats a token."""
        return exp(self.source_nats)

    @property
    def quantized(self) -> float:
        """The perplexity of the quantized model."""
        return exp(self.quantized_nats)

    def to_dict(self) -> dict[str, object]:
        """The fields and both perplexities as JSON can hold them."""
        return {**asdict(self), "source": self.source, "quantized": self.quantized}


def split_windows(ids: Sequence[int], length: int, first: int | None = None) -> list[Tensor]:
    """Cut token ids into windows of at most `length`, int64 [L] each.

    Args:
        ids: of a text.
        length: most tokens of a window, `first` included; 2 or more.
        first: a token that every window begins with, such as the beginning of a text; None: none.

    Raises:
        ConfigError: there are fewer than two tokens, so none is predicted.

    Example:
        >>> from bigq.evaluation.perplexity import split_windows
        >>> [window.tolist() for window in split_windows([5, 6, 7, 8], 3, first=1)]
        [[1, 5, 6], [1, 7, 8]]
    """
    lead = [] if first is None else [first]
    step = length - len(lead)
    if step < 1 or length < 2:
        raise ConfigError(f"windows of {length} tokens predict none; expected 2 or more")
    windows = [torch.tensor([*lead, *ids[start : start + step]]) for start in range(0, len(ids), step)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ConfigError(f"a text of {len(ids)} tokens predicts none: pass a longer text")
    return windows


def compare_losses(source: Sequence[Tensor], quantized: Sequence[Tensor]) -> Perplexity:
    """Compare two models' negative log likelihoods of the same tokens.

    Args:
        source: those of each window, [L - 1], in nats.
        quantized: as many, of the same shapes.

    Example:
        >>> import torch
        >>> from bigq.evaluation.perplexity import compare_losses
        >>> found = compare_losses([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 4.0])])
        >>> found.source_nats, found.change_nats, found.standard_error
        (2.0, 0.5, 0.5)
    """
    before, after = torch.cat(list(source)).double(), torch.cat(list(quantized)).double()
    change = after - before
    tokens = len(change)
    return Perplexity(
        tokens=tokens,
        source_nats=before.mean().item(),
        quantized_nats=after.mean().item(),
        change_nats=change.mean().item(),
        standard_error=(change.std() / sqrt(tokens)).item() if tokens > 1 else None,
    )
