"""How the plots look: one light card that is legible on a light and on a dark page, and how they are saved."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
INK, PAPER = "#24292f", "#f6f8fa"
OURS, FLOAT, OTHER = "#0f766e", "#64748b", "#b4bcc8"  # of bigq, of float weights, of other libraries

plt.rcParams.update(
    {
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
)


def results(name: str) -> dict[str, list[object]]:
    """The rows of docs/results/NAME.json by their first cell."""
    text = (DOCS / "results" / f"{name}.json").read_text(encoding="utf-8")
    return {row[0]: row[1:] for row in json.loads(text)["rows"]}


def save(figure: Figure, name: str) -> Path:
    """Save a figure as NAME.png beside this file, or in the folder that the script was given."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent) / f"{name}.png"
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
