"""fit_stories.png: what formats that `bigq.fit` chose cost a language model, against one format for all weights."""

import json

import matplotlib.pyplot as plt
from style import DOCS, OTHER, OURS, save

RESULTS = json.loads((DOCS / "results" / "fit_stories.json").read_text(encoding="utf-8"))
BITS, NATS, KL = (RESULTS["columns"].index(name) for name in ("bits a weight", "nats a token", "divergence"))
rows = [row for row in RESULTS["rows"] if row[BITS] <= 7.5]  # int8, at 8.1 bits, loses 0.0016
uniform = [row for row in rows if row[1] == "all weights"]

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
for axis, column, title in ((axes[0], NATS, "Nats a token lost"), (axes[1], KL, "Divergence (KL), nats a token")):
    for name, color, marker in (("output", OURS, "o"), ("kfac", "#b45309", "s")):
        points = sorted((row[BITS], row[column]) for row in rows if row[0] == name and row[1] == "random ids")
        start = min(uniform, key=lambda row: row[BITS])
        points = [(start[BITS], start[column]), *points]
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=f'fit, "{name}"')
    axis.plot(*zip(*((row[BITS], row[column]) for row in uniform), strict=True), "D", color=OTHER, label="one format")
    for row in uniform:
        axis.annotate(row[0], (row[BITS], row[column]), (7, 4), textcoords="offset points")
    axis.set_title(title, loc="left")
    axis.set_xlabel("bits a weight, with scales")
    axis.set_ylim(0, 1.12 * max(row[column] for row in rows))
axes[0].legend(frameon=False, loc="lower left")
save(figure, "fit_stories")
