"""formats.png: what each format takes, what it costs in perplexity, and how long a linear of an 8B model takes."""

import json

import matplotlib.pyplot as plt
from style import DOCS, FLOAT, OURS, results, save


def one_token(name: str) -> dict[str, float]:
    """Microseconds of one token at 14336 x 4096 by kernel, from docs/results/NAME.json."""
    rows = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return {row[1]: row[2] for row in rows if row[0] == "14336 x 4096"}


accuracy, linears, int8 = results("accuracy"), one_token("linears"), one_token("linears_int8")
SIZES = json.loads((DOCS / "results" / "size_and_error.json").read_text(encoding="utf-8"))["rows"]
BITS = {"bf16": 16.0} | {  # of weights with normally distributed numbers
    name: bits
    for wanted in ("int8", "nf4", "nf4 + double quant", "fp4")
    for name, block, library, _, _, bits, *_ in SIZES
    if (name, library) == (wanted, "bigq") and block in (64, "row")
}
NATS = {name: accuracy["LLM.int8(), threshold 6" if name == "int8" else name][0] for name in BITS if name != "bf16"}
US = {name: linears[name] for name in BITS if name in linears}
US |= {"bf16": linears["bf16 cuBLAS"], "int8": int8["threshold 6, one outlier column"]}
PANELS = [
    ("Bits of a weight", BITS, "{:.1f}"),
    ("Nats a token lost", {"bf16": 0.0} | NATS, "{:.4f}"),
    ("A linear, one token", US, "{:.1f} us"),
]

figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 2.5), layout="constrained", sharey=True)
colors = [FLOAT if name == "bf16" else OURS for name in BITS]
for axis, (title, values, text) in zip(axes, PANELS, strict=True):
    heights = [values[name] for name in BITS]
    drawn = axis.barh(list(BITS), heights, color=colors, height=0.62)
    labels = [text.format(value) if value else "the float model" for value in heights]
    axis.bar_label(drawn, labels, padding=4)
    axis.set_title(title, loc="left")
    axis.set_xlim(0, max(heights) * 1.3)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
axes[0].invert_yaxis()  # of all three, which share it
save(figure, "formats")
