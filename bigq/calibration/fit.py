"""fit: choose a format for every weight of a model by what it does to the outputs, under a budget of bytes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn

from bigq.calibration.batches import as_batches
from bigq.calibration.budget import Option, choose, smallest, upgrades
from bigq.calibration.fit_result import Fit, FitPoint, FormatCost, WeightFit, format_label
from bigq.calibration.format_rules import with_formats
from bigq.calibration.sampled_passes import evaluating, sample_products
from bigq.calibration.sensitivity import SENSITIVITIES, sensitivities
from bigq.calibration.stored_sizes import StoredSizes, stored_sizes
from bigq.calibration.watched_products import WatchedWeight
from bigq.config import QuantizationConfig
from bigq.errors import ConfigError, PlacementError, UnsupportedError
from bigq.formats import Format
from bigq.interop.bitsandbytes_configs import as_config
from bigq.interop.bitsandbytes_models import refuse_bitsandbytes
from bigq.model.tree import ModelTree, held_tensor
from bigq.system.text import shortlist
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["check_budget", "fit"]

_TOKENS = 256  # with 1024, stories15M got the same formats, and so it did with other random ids


def fit(
    model: nn.Module,
    *,
    max_bytes: int | str | None = None,
    bits: float | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    batches: Iterable[object] | None = None,
    formats: Sequence[Format | str | None] = ("nf4", "int8", None),
    config: QuantizationConfig | object | None = None,
    sensitivity: str = "kfac",
    logits: Callable[[Any], Tensor] | None = None,
    tokens: int = _TOKENS,
    seed: int = 0,
) -> Fit:
    """Choose a format for every weight that would be quantized, so that the model fits a budget and suffers little.

    One of `max_bytes`, `bits` and `max_memory` is the budget. Each weight begins with its smallest format. Then the
    weight whose sensitivity drops most for a byte gets a larger one, until nothing fits any more.

    Args:
        model: with its float weights, on the CPU or on GPUs. It is run on `batches` in eval mode, forward and, for
            "kfac", backward. It is not changed: modes and `requires_grad` are restored, also after an error. Parameters
            get no gradients. The pass needs memory for the activations of one batch.
        max_bytes: bytes of the whole model as bigq stores it, or a string such as "12GiB". Everything counts: weights,
            what is kept, buffers, descriptions.
        bits: average bits of the weights that are chosen for; a kept weight counts with those of its dtype.
        max_memory: as in `load_and_quantize_model`; the memory of its GPUs, summed, is `max_bytes`. How layers divide
            between GPUs is not considered, so leave room for it.
        batches: as tensors, mappings of keyword arguments or tuples of arguments, of a kind that the model is used for.
            None: 8 rows of 256 random token ids.
        formats: to choose among: formats or their names; None: kept. Formats are assumed to be worse the smaller they
            are; one that is not is never chosen.
        config: which weights are quantized, and all other settings. Its format is replaced. Its rules stay, and weights
            that they match get no other format. None: QuantizationConfig("nf4").
        sensitivity: "kfac": how far the distribution that the model predicts moves, for which labels are sampled from
            it. "output": the relative error of a weight's outputs, which needs no backward pass and no logits.
        logits: a function from what the model returns to its logits [..., C], for "kfac". None: `.logits`, or the
            returned tensor, or the first tensor of a returned tuple.
        tokens: how many tokens are kept for each weight, in host memory: K + N numbers each, in the model's dtype
            (at 256 tokens, 1.3 GB for 8B parameters in bfloat16).
        seed: of random ids, tokens and labels. Equal arguments give equal results on one device.

    Returns:
        the formats as a config, with a table and a plot of what they cost.

    Raises:
        ConfigError: an argument is unknown or contradicts another, the budget holds the whole model without
            quantization, or a weight that is to be quantized multiplies nothing on these batches.
        PlacementError: the smallest formats do not fit into the budget.
        UnsupportedError: the model is quantized, has no weight to quantize, or no gradients.

    Example:
        >>> import bigq, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 50))
        >>> found = bigq.fit(model, bits=6.5)
        >>> found.rules
        (('2', Int8(threshold=6.0)),)
        >>> model = bigq.load_and_quantize_model(model, None, found.config, "cpu")
        >>> bigq.memory_footprint(model).total_nbytes == found.nbytes
        True
    """
    budget = _Budget.of(max_bytes, bits, max_memory)
    if sensitivity not in SENSITIVITIES:
        raise ConfigError(f"sensitivity is {sensitivity!r}; expected one of {list(SENSITIVITIES)}")
    if type(tokens) is not int or tokens < 1:
        raise ConfigError(f"tokens is {tokens!r}; expected a number of tokens, such as {_TOKENS}")
    choices = _formats(formats)
    own_config = QuantizationConfig("nf4") if config is None else as_config(config, model)
    tree = ModelTree(model)
    _refuse_quantized(tree)
    sizes = stored_sizes(tree, own_config, choices)
    limit = budget.limit(sizes)

    weights = _watched(tree, sizes)
    with evaluating(model):
        given = as_batches(model, batches, seed=seed, rows=1)
        sampled = sample_products(
            model, weights, given, size=tokens, seed=seed, gradients=sensitivity == "kfac", logits=logits
        )
    errors = sensitivities(weights, sizes.plans, sampled, kind=sensitivity)
    return _fitted(own_config, sizes, budget, limit, errors, sensitivity)


def check_budget(max_bytes: object, bits: object) -> None:
    """Raise a ConfigError unless one of the two is a budget that `fit` takes."""
    _Budget.of(max_bytes, bits, None)


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """`nbytes` of the whole model, or `bits` of the weights; `asked` is the argument, for errors."""

    nbytes: int | None
    bits: float | None
    asked: str

    @staticmethod
    def of(max_bytes: object, bits: object, max_memory: Mapping[int | str, int | str] | None) -> "_Budget":
        given = {"max_bytes": max_bytes, "bits": bits, "max_memory": max_memory}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            found = " and ".join(named) if named else "none of them"
            raise ConfigError(f"the budget is one of max_bytes, bits and max_memory; got {found}")
        asked = f"{named[0]}={given[named[0]]!r}"
        if max_memory is not None:
            on_gpus = [_nbytes("max_memory", value) for place, value in max_memory.items() if isinstance(place, int)]
            if not on_gpus:
                raise ConfigError(f"{asked} names no GPU; expected {{GPU index: bytes}}, such as {{0: '12GiB'}}")
            return _Budget(nbytes=sum(on_gpus), bits=None, asked=asked)
        if max_bytes is not None:
            return _Budget(nbytes=_nbytes("max_bytes", max_bytes), bits=None, asked=asked)
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits < math.inf:
            raise ConfigError(f"bits is {bits!r}; expected a number of bits, such as 5.0")
        return _Budget(nbytes=None, bits=float(bits), asked=asked)

    def limit(self, sizes: StoredSizes) -> int:
        """What the costs of all weights may add up to.

        Raises:
            PlacementError: the smallest formats cost more.
            ConfigError: the model fits as it is.
        """
        costs = [[self.cost(sizes, name, at) for at in range(len(sizes.formats))] for name in sizes.weights]
        numel = sum(sizes.numel.values())
        if self.nbytes is not None:
            limit = self.nbytes - sizes.other_nbytes
        else:
            limit = math.floor(self.bits * numel / 8 + 1e-6)  # type: ignore[operator]
        low = sum(min(own) for own in costs)
        names = ", ".join(format_label(weight_format) for weight_format in sizes.formats)
        if low > limit:
            least = (
                f"{low + sizes.other_nbytes:,} bytes, of which {sizes.other_nbytes:,} are not chosen for"
                if self.nbytes is not None
                else f"{8 * low / numel:.4g} bits a weight"
            )
            raise PlacementError(
                f"{self.asked} is too little: with the smallest of the formats {names} for every weight, the model "
                f"takes {least}; allow more, quantize more weights (also_quantize in the config), or pass smaller "
                "formats, such as NF4(double_quant=True)"
            )
        if None in sizes.formats and sizes.must_quantize:
            kept = sum(own[sizes.formats.index(None)] for own in costs)
            if kept <= limit:
                least = (
                    f"{kept + sizes.other_nbytes:,} bytes"
                    if self.nbytes is not None
                    else f"{8 * kept / numel:.4g} bits"
                )
                raise ConfigError(f"{self.asked} holds the model as it is ({least}): there is nothing to quantize")
        return limit

    def cost(self, sizes: StoredSizes, name: str, at: int) -> int:
        """What one weight costs in a format; descriptions do not count as bits of a weight."""
        stored = sizes.weights[name][at]
        return stored.nbytes if self.nbytes is not None else stored.numbers_nbytes


def _nbytes(name: str, value: object) -> int:
    try:
        nbytes = convert_file_size_to_int(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name} is {value!r}; expected bytes, or a string such as '12GiB'") from error
    if type(nbytes) is not int or nbytes <= 0:
        raise ConfigError(f"{name} is {value!r}; expected bytes, or a string such as '12GiB'")
    return nbytes


def _formats(formats: Sequence[Format | str | None]) -> tuple[Format | None, ...]:
    if isinstance(formats, str) or not isinstance(formats, Iterable):
        raise ConfigError(f"formats is {formats!r}; expected a list of formats, such as ['nf4', 'int8', None]")
    made = [None if found is None else QuantizationConfig(found).weight_format() for found in formats]
    distinct = tuple(dict.fromkeys(made))
    if len(distinct) < 2:
        raise ConfigError(f"formats is {list(formats)}; expected at least two to choose among")
    return distinct


def _refuse_quantized(tree: ModelTree) -> None:
    refuse_bitsandbytes(tree)
    found = [name for name, module in tree.modules.items() if isinstance(module, QuantizedModule)]
    if found:
        raise UnsupportedError(
            f"{len(found)} modules of {type(tree.model).__name__} are quantized: {shortlist(found)}; fit compares "
            "formats with the float weights, so pass the model before it is quantized"
        )


def _watched(tree: ModelTree, sizes: StoredSizes) -> list[WatchedWeight]:
    """The weights to choose for, with their numbers."""
    weights = [
        WatchedWeight(name, held_tensor(tree.modules, name), transposed)
        for name, transposed in sizes.transposed.items()
    ]
    empty = [weight.name for weight in weights if weight.tensor.is_meta]
    if empty:
        raise UnsupportedError(
            f"{len(empty)} weights of {type(tree.model).__name__} are on meta: {shortlist(empty)}; fit runs the model, "
            "so load its float weights, all of them in memory, first"
        )
    return weights


def _fitted(
    config: QuantizationConfig,
    sizes: StoredSizes,
    budget: _Budget,
    limit: int,
    errors: Mapping[str, Sequence[float]],
    sensitivity: str,
) -> Fit:
    """Choose, and say what was chosen."""
    costs: dict[str, tuple[FormatCost, ...]] = {}
    for name, stored in sizes.weights.items():
        own = iter(errors[name])
        costs[name] = tuple(
            FormatCost(format=found, nbytes=size.nbytes, sensitivity=0.0 if found is None else next(own))
            for found, size in zip(sizes.formats, stored, strict=True)
        )
    options = [
        [Option(budget.cost(sizes, name, at), cost.sensitivity) for at, cost in enumerate(own)]
        for name, own in costs.items()
    ]
    chosen = dict(zip(costs, choose(options, limit), strict=True))

    def point(picks: Iterable[int]) -> FitPoint:
        picked = [own[at] for own, at in zip(costs.values(), picks, strict=True)]
        nbytes = sizes.other_nbytes + sum(cost.nbytes for cost in picked)
        return FitPoint(nbytes=nbytes, error=math.fsum(cost.sensitivity for cost in picked))

    now = smallest(options)
    curve = [point(now)]
    for place, to in upgrades(options):
        now[place] = to
        curve.append(point(now))
    found = {name: own[chosen[name]].format for name, own in costs.items()}
    if not sizes.searches(found):  # a load would refuse a search of nothing
        config = replace(config, method="absmax", moments=None)
    fitted = with_formats(config, found, lambda tried: sizes.formats_by(tried) == sizes.expected(found))
    here = point(chosen.values())
    numbers = sum(sizes.weights[name][at].numbers_nbytes for name, at in chosen.items())
    return Fit(
        config=fitted,
        weights=tuple(
            WeightFit(name=name, numel=sizes.numel[name], costs=own, chosen=chosen[name]) for name, own in costs.items()
        ),
        nbytes=sizes.nbytes_by(fitted),
        bits=8 * numbers / sum(sizes.numel.values()),
        error=here.error,
        sensitivity=sensitivity,
        curve=tuple(curve),
        uniform={format_label(f): point([at] * len(costs)) for at, f in enumerate(sizes.formats)},
    )
