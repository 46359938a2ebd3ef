"""Fit: the formats that `fit` chose for the weights of a model, what they cost, and what else they could be."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bigq.calibration.fit_plot import plot_fit
from bigq.config import QuantizationConfig, Rules
from bigq.formats import Format
from bigq.system.text import format_table

__all__ = ["Fit", "FitPoint", "FormatCost", "WeightFit", "format_label"]

_ERRORS = {
    "kfac": "estimated divergence, nats a prediction",
    "output": "squared relative errors of outputs, summed",
}


@dataclass(frozen=True, kw_only=True)
class FormatCost:
    """A format that a weight could have.

    Args:
        format: None stands for a weight that is kept.
        nbytes: bytes of all tensors that the weight becomes, with its description in quant_state.
        sensitivity: how much worse the model gets: by "kfac" in nats for each prediction, by "output" the squared
            relative error of the weight's outputs. 0.0 for a weight that is kept.
    """

    format: Format | None
    nbytes: int
    sensitivity: float


@dataclass(frozen=True, kw_only=True)
class WeightFit:
    """A weight and the format that was chosen for it.

    Args:
        name: of the Parameter, the first one if the weight is tied.
        numel: how many numbers it has.
        costs: of each format that it could have, in the order in which `fit` was given them.
        chosen: which of `costs`.
    """

    name: str
    numel: int
    costs: tuple[FormatCost, ...]
    chosen: int

    @property
    def format(self) -> Format | None:
        """The chosen format; None: the weight is kept."""
        return self.costs[self.chosen].format


@dataclass(frozen=True, kw_only=True)
class FitPoint:
    """A choice of formats: bytes of the whole model, and the sensitivities of all weights summed."""

    nbytes: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What `bigq.fit` returns: a config whose rules give every weight the format that was chosen for it.

    Args:
        config: loads the model with these formats.
        weights: what was chosen among, and what was chosen, in the order of the model.
        nbytes: of the whole model as it is stored: quantized weights with their descriptions, and what is kept.
        bits: average over the numbers of `weights`. Descriptions are not counted.
        error: the sensitivities of the chosen formats, summed.
        sensitivity: "kfac" or "output".
        curve: the choices from the smallest on, each with one weight more in a larger format.
        uniform: {name of a format: the choice of it for all of `weights`}.
    """

    config: QuantizationConfig
    weights: tuple[WeightFit, ...]
    nbytes: int
    bits: float
    error: float
    sensitivity: str
    curve: tuple[FitPoint, ...]
    uniform: Mapping[str, FitPoint]

    @property
    def rules(self) -> Rules:
        """The rules of `config`: pairs of a pattern and a format, or None for weights that are kept."""
        return self.config.ordered_rules()

    def table(self) -> str:
        """A table as text: a line for each weight, with its sensitivity in each format, what was chosen, and bytes."""
        labels = [format_label(cost.format) for cost in self.weights[0].costs]
        rows = [("weight", *labels, "chosen", "bytes")]
        for weight in self.weights:
            chosen = weight.costs[weight.chosen]
            cells = (f"{cost.sensitivity:.2e}" if cost.format is not None else "0" for cost in weight.costs)
            rows.append((weight.name, *cells, format_label(chosen.format), f"{chosen.nbytes:,}"))
        sums = (f"{self.uniform[label].error:.2e}" if label in self.uniform else "" for label in labels)
        nbytes = sum(weight.costs[weight.chosen].nbytes for weight in self.weights)
        rows.append(("sum", *sums, f"{self.error:.2e}", f"{nbytes:,}"))
        return format_table(rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw error against bytes: the curve, the chosen point, and each format for all weights.

        Args:
            path: of the file that is written: .png, .svg or .pdf.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        plot_fit(
            path,
            curve=[(point.nbytes, point.error) for point in self.curve],
            uniform={label: (point.nbytes, point.error) for label, point in self.uniform.items()},
            chosen=(self.nbytes, self.error),
            chosen_label=f"chosen: {self.nbytes / 1e6:.4g} MB, {self.bits:.2f} bits a weight",
            error_label=_ERRORS[self.sensitivity],
        )


def format_label(weight_format: Format | None) -> str:
    """A format in a table: its name, and its settings where they are not those of the name alone."""
    if weight_format is None:
        return "kept"
    plain = type(weight_format)().describe()
    settings = {key: value for key, value in weight_format.describe().items() if plain[key] != value}
    return " ".join([weight_format.name, *(f"{key}={value}" for key, value in settings.items())])
