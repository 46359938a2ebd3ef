"""plot_comparison: a picture of a comparison: bytes, weight errors and speed."""

import os
from errno import ENOENT
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigq.errors import UnsupportedError
from bigq.evaluation.comparison import Comparison
from bigq.evaluation.speed import Speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plot", "plot_comparison"]

_COLORS = ("#8da0b3", "#d95f02")  # grey and orange, which differ in print and for the colour-blind, too
_MOST_GROUPS = 16


def plot_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write a picture of a comparison to a file. Raises what `check_plot` raises.

    Args:
        comparison: what `compare` returned.
        path: of the picture; its ending, such as .png or .svg, says the format.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_speed = bool(comparison.source.speeds)
    figure = Figure(figsize=(11, 8 if has_speed else 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2 if has_speed else 1, 2, squeeze=False)
    _bytes(axes[0][0], comparison)
    _errors(axes[0][1], comparison)
    if has_speed:
        _speeds(axes[1][0], comparison, "prefill")
        if comparison.source.speeds[0].decode is None:
            axes[1][1].set_visible(False)
        else:
            _speeds(axes[1][1], comparison, "decode")
    figure.suptitle(_title(comparison), fontsize=11)
    figure.savefig(path, dpi=140)


def check_plot(path: str | os.PathLike[str]) -> None:
    """See whether a plot can be written to `path`, before anything is measured.

    Raises:
        UnsupportedError: matplotlib is not installed, or does not write files with this ending.
        FileNotFoundError: the folder does not exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UnsupportedError("a plot needs matplotlib, which is not installed: pip install 'bigq[plots]'") from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise UnsupportedError(f"the plot {os.fspath(path)} has no ending of {', '.join(sorted(known))}: choose one")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(ENOENT, "no such folder for the plot", str(Path(path).parent))


def _title(comparison: Comparison) -> str:
    said = [" and ".join(Path(side.name).name for side in (comparison.source, comparison.quantized))]
    if comparison.perplexity is not None:
        found = comparison.perplexity
        error = "" if found.standard_error is None else f" \u00b1 {found.standard_error:.4f}"
        said.append(
            f"perplexity {found.source:.3f} to {found.quantized:.3f}: {found.change_nats:+.4f}{error} nats a token"
        )
    if comparison.logits is not None and comparison.logits.kl is not None:
        said.append(
            f"KL {comparison.logits.kl:.4f} nats a token, same likeliest token {comparison.logits.top1_agreement:.1%}"
        )
    return "\n".join(said)


def _bytes(axes: "Axes", comparison: Comparison) -> None:
    kinds: list[tuple[str, list[int]]] = [
        ("files", [side.files_nbytes or 0 for side in (comparison.source, comparison.quantized)]),
        ("tensors in memory", [side.memory_nbytes for side in (comparison.source, comparison.quantized)]),
    ]
    for one, other in zip(comparison.source.speeds, comparison.quantized.speeds, strict=True):
        if one.peak_nbytes is not None and other.peak_nbytes is not None:
            kinds.append((f"peak, batch {one.batch}", [one.peak_nbytes, other.peak_nbytes]))
    kinds = [kind for kind in kinds if all(kind[1])]
    unit, name = (1e9, "GB") if max(max(values) for _, values in kinds) >= 1e9 else (1e6, "MB")
    _pairs(axes, [kind for kind, _ in kinds], [[value / unit for value in values] for _, values in kinds])
    axes.set_title(f"Size, {name}")
    axes.legend(fontsize=8)


def _errors(axes: "Axes", comparison: Comparison) -> None:
    groups = sorted((group for group in comparison.groups if group.error), key=lambda group: group.error)
    shown = groups[-_MOST_GROUPS:]
    names = [f"{group.group.removesuffix('.weight')} ({group.format})" for group in shown]
    axes.barh(range(len(shown)), [group.error for group in shown], color=_COLORS[1])
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    left = f", the largest {_MOST_GROUPS} of {len(groups)}" if len(groups) > len(shown) else ""
    axes.set_title(f"Relative error of weights{left}")


def _speeds(axes: "Axes", comparison: Comparison, phase: str) -> None:
    pairs = [
        (one, other)
        for one, other in zip(comparison.source.speeds, comparison.quantized.speeds, strict=True)
        if getattr(one, phase) is not None and getattr(other, phase) is not None
    ]
    values = [[_rate(one, phase), _rate(other, phase)] for one, other in pairs]
    _pairs(axes, [f"batch {one.batch}" for one, _ in pairs], values)
    axes.set_title(f"{phase.capitalize()}, tokens a second")


def _rate(speed: Speed, phase: str) -> float:
    value: float = getattr(speed, phase).value
    return value


def _pairs(axes: "Axes", names: list[str], values: list[list[float]]) -> None:
    """Two bars for each name: source and quantized."""
    for number, (color, label) in enumerate(zip(_COLORS, ("source", "quantized"), strict=True)):
        places = [index + (number - 0.5) * 0.38 for index in range(len(names))]
        bars = axes.bar(places, [pair[number] for pair in values], 0.36, color=color, label=label)
        axes.bar_label(bars, [_short(pair[number]) for pair in values], fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.margins(y=0.25)


def _short(value: float) -> str:
    """Three digits or more: 0.271, 14.1, 26,103."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
