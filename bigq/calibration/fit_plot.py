"""plot_fit: the error of a model against its bytes, as a picture."""

import os
from collections.abc import Mapping, Sequence

from bigq.errors import UnsupportedError

__all__ = ["plot_fit"]

Point = tuple[int, float]  # bytes of the model, and the sum of its sensitivities


def plot_fit(
    path: str | os.PathLike[str],
    *,
    curve: Sequence[Point],
    uniform: Mapping[str, Point],
    chosen: Point,
    chosen_label: str,
    error_label: str,
) -> None:
    """Draw a curve, the chosen point and one format for all weights into the file `path`, with a logarithmic error.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("a plot needs matplotlib: pip install 'bigq[plots]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log", nonpositive="mask")  # a model of kept weights has no error
    axes.plot(*_columns(curve), color="tab:blue", label="fit")
    for label, point in uniform.items():
        if point[1] > 0:
            axes.plot(*_columns([point]), "o", color="tab:gray")
            axes.annotate(f"all {label}", (point[0] / 1e6, point[1]), (6, 5), textcoords="offset points")
    axes.plot(*_columns([chosen]), "*", color="tab:red", markersize=14, label=chosen_label)
    axes.set_xlabel("bytes of the model, MB")
    axes.set_ylabel(error_label)
    axes.grid(alpha=0.3)
    axes.margins(y=0.1)
    axes.legend()
    figure.savefig(path, dpi=150)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [nbytes / 1e6 for nbytes, _ in points], [error for _, error in points]
