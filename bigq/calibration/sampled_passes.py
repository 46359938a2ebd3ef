"""sample_products: run a model on batches, forward and backward, and sample what its weights multiply."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.calibration.batches import Batch
from bigq.calibration.token_sample import Tokens
from bigq.calibration.watched_products import Use, WatchedProducts, WatchedWeight
from bigq.errors import ConfigError, UnsupportedError
from bigq.offload.containers import map_tensors
from bigq.system.text import shortlist

__all__ = ["Sampled", "evaluating", "sample_products"]

_ADVICE = "pass sensitivity='output', which needs no backward pass"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled:
    """What `sample_products` returns: the sampled tokens by use of a weight, and how many predictions were made."""

    tokens: Mapping[Use, Tokens]
    predictions: int


def sample_products(
    model: nn.Module,
    weights: Sequence[WatchedWeight],
    batches: Sequence[Batch],
    *,
    size: int,
    seed: int,
    gradients: bool,
    logits: Callable[[Any], Tensor] | None = None,
) -> Sampled:
    """Run `model` on `batches` and sample the tokens that `weights` multiply.

    With `gradients`, each prediction is a label that is sampled from the model's own distribution, and the gradients
    are those of the logarithm of its probability. Only activations get gradients.

    Args:
        model: in eval mode, with no Parameter that requires a gradient, as `evaluating` makes it. It is not changed.
        size: tokens that are kept for each use of a weight.
        seed: of the tokens and the labels.
        logits: from what the model returns to its logits [..., C]; None: see `_logits`.

    Raises:
        ConfigError: a weight was in no product, so nothing is known of it.
        UnsupportedError: there are no logits, or no gradient, or memory ran out.
    """
    watch = WatchedProducts(weights, size=size, seed=seed, gradients=gradients)
    generators: dict[torch.device, torch.Generator] = {}
    predictions = 0
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        for batch in batches:
            args, kwargs = map_tensors(lambda tensor: tensor.detach(), (batch.args, dict(batch.kwargs)))
            watch.mask = _mask(kwargs)
            try:
                with watch:
                    out = Batch(args=args, kwargs=kwargs).call(model)
                if gradients:
                    found = _logits(out, logits)
                    if found.device not in generators:
                        generators[found.device] = torch.Generator(found.device).manual_seed(seed)
                    predictions += _backward(found, watch.mask, generators[found.device])
            except torch.OutOfMemoryError as error:
                raise UnsupportedError(
                    f"a forward and backward pass of {type(model).__name__} took more memory than there is ({error}): "
                    f"pass smaller batches, or {_ADVICE}"
                ) from error
            del out
            watch.compact()
    seen = {use.name for use in watch.samples}
    _refuse_unseen(model, [weight for weight in weights if weight.name not in seen])
    if watch.without_grad:
        raise UnsupportedError(
            f"{len(watch.without_grad)} weights multiply where the model turns gradients off (torch.no_grad): "
            f"{shortlist([*watch.without_grad])}; {_ADVICE}"
        )
    if gradients and not predictions:
        raise ConfigError("the model predicts nothing on these batches: by their attention_mask, all is padding")
    return Sampled(tokens=watch.tokens(), predictions=predictions)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within `with`, the model is in eval mode, no Parameter requires a gradient, and compiled modules run eagerly."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        model.eval()
        # Nothing is compiled before dynamo is imported, which takes a second or more.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _logits(out: Any, logits: Callable[[Any], Tensor] | None) -> Tensor:
    """The logits [..., C] in what a model returned: `.logits`, the tensor itself, or the first one of a tuple."""
    if logits is not None:
        found: object = logits(out)
    elif isinstance(out, Mapping) or hasattr(out, "logits"):
        found = out.get("logits") if isinstance(out, Mapping) else out.logits
    else:
        parts = out if isinstance(out, (tuple, list)) else [out]
        found = next((part for part in parts if isinstance(part, Tensor) and part.dim() >= 2), None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        what = sorted(out) if isinstance(out, Mapping) else type(out).__name__
        raise UnsupportedError(
            f"the model returned no logits, but {what}: pass logits=, a function from what it returns to the logits "
            f"[..., classes], or {_ADVICE}"
        )
    if found.shape[-1] < 2:
        raise UnsupportedError(
            f"the logits are {list(found.shape)}, of one class, which has a probability of 1 whatever the weights are: "
            f"pass logits=, or {_ADVICE}"
        )
    return found


def _backward(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> int:
    """Sample a label for each row of logits, and compute the gradients of the log of its probability."""
    if not logits.requires_grad:
        raise UnsupportedError(
            "the logits have no gradient: no weight that is to be quantized leads to them, or the model turns "
            f"gradients off or detaches its activations; {_ADVICE}"
        )
    rows = logits[mask.to(logits.device)] if mask is not None and mask.shape == logits.shape[:-1] else logits
    log_probabilities = rows.reshape(-1, rows.shape[-1]).float().log_softmax(-1)
    probabilities = log_probabilities.detach().exp()
    if not probabilities.isfinite().all():
        raise ConfigError("the logits hold NaN or Inf: the model cannot compute these batches in its dtype")
    if not len(probabilities):
        return 0
    labels = torch.multinomial(probabilities, 1, generator=generator)
    try:
        log_probabilities.gather(1, labels).sum().backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an op without a gradient, or an activation that was written to
        raise UnsupportedError(f"the backward pass of the model failed ({error}): {_ADVICE}") from error
    return len(labels)


def _mask(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The attention mask [B, T] of a batch as bool on the CPU; None without padding, and for an encoder-decoder."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or "decoder_input_ids" in kwargs:
        return None
    kept = mask.to("cpu") != 0
    return None if bool(kept.all()) else kept


def _refuse_unseen(model: nn.Module, weights: Sequence[WatchedWeight]) -> None:
    """Raise a ConfigError if nothing is known of some weights."""
    if not weights:
        return
    names = [weight.name for weight in weights]
    advice = "pass batches that reach them"
    if any(weight.tensor.dim() == 3 for weight in weights):
        advice += " (experts_implementation='batched_mm' multiplies copies, which are not seen: use 'grouped_mm')"
    raise ConfigError(
        f"{type(model).__name__} multiplied nothing by {len(names)} of its weights on these batches: "
        f"{shortlist(names)}; {advice}, or give them a format with rules= in the config, such as "
        f"{{{names[0]!r}: 'nf4'}}: a weight with a rule is not measured"
    )
