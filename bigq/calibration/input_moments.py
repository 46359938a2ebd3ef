"""input_moments: run a model on a few batches, and measure how large the inputs of its weights are."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bigq.calibration.batches import as_batches
from bigq.calibration.measured_inputs import MeasuredInputs
from bigq.errors import ConfigError
from bigq.formats import InputMoments
from bigq.model.tree import ModelTree
from bigq.system.text import shortlist

__all__ = ["input_moments"]


def input_moments(model: nn.Module, batches: Iterable[object] | None = None, *, seed: int = 0) -> InputMoments:
    """Measure the mean of x_j^2 over tokens for each input feature j of each linear of a model.

    `QuantizationConfig(method="search", moments=...)` uses them. Which features are large depends little on the text,
    so random token ids serve a language model that has no text of its own at hand. A few thousand tokens are enough.

    The model runs in eval mode and without gradients, and is as it was afterwards. It may be offloaded, and its weights
    may be quantized: a model in int8 is measured in a quarter of the memory of float32. Measured are the inputs of
    nn.Linear and its subclasses, of GPT-2's Conv1D, and of the fused experts of transformers.

    Args:
        model: with numbers, on any devices.
        batches: each a tensor, such as ids [B, T], a mapping of keyword arguments or a tuple of arguments of the model.
            Padding counts as tokens do. None: 8 rows of 256 random token ids.
        seed: of the random ids.

    Returns:
        {name of the weight: float32 [K], on the CPU}. `unreached` are weights whose inputs were not seen: no batch
        reached their module, or they are the `down_proj` of experts that are quantized or multiply copies of it.

    Raises:
        ConfigError: `batches` is no list of batches, or is None and the model does not take token ids alone; or an
            input holds NaN or Inf; or no linear was reached.

    Example:
        >>> import bigq, torch
        >>> class Tiny(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words, self.up = torch.nn.Embedding(100, 64), torch.nn.Linear(64, 32)
        ...     def forward(self, ids):
        ...         return self.up(self.words(ids))
        >>> model = Tiny()
        >>> moments = bigq.input_moments(model)
        >>> {name: tuple(tensor.shape) for name, tensor in moments.items()}
        {'up.weight': (64,)}
        >>> config = bigq.QuantizationConfig("nf4", method="search", moments=moments)
        >>> bigq.load_and_quantize_model(model, None, config, device_map="cpu").up
        QuantizedLinear(in_features=64, out_features=32, bias=True, format=nf4, block_size=64, double_quant=False)
    """
    prepared = as_batches(model, batches, seed=seed)
    measured = MeasuredInputs(ModelTree(model))
    with measured.watched(), _evaluating(model), torch.no_grad():
        for batch in prepared:
            batch.call(model)
    means = {name: found.mean() for name, found in measured.inputs.items()}
    reached = {name: mean for name, mean in means.items() if mean is not None}
    if not reached:
        raise ConfigError(
            f"the batches reached none of the {len(means)} linears of {type(model).__name__}: "
            f"{shortlist(list(means)) or 'it has none'}"
        )
    bad = [name for name, mean in reached.items() if not mean.isfinite().all()]
    if bad:
        raise ConfigError(
            f"the inputs of {len(bad)} weights hold NaN or Inf: {shortlist(bad)}; the model overflows on these "
            "batches: run it in bfloat16 or float32, or pass other batches"
        )
    return InputMoments(reached, unreached=[name for name in means if name not in reached])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run `model` in eval mode, and give each module its own mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True
