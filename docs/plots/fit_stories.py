"""fit_stories.png: what formats that `bigq.fit` chose cost a language model, against one format for all weights."""

import json

import matplotlib.pyplot as plt
from style import DOCS, OTHER, OURS, save

RESULTS = json.loads((DOCS / "results" / "fit_stories.json").read_text(encoding="utf-8"))
BITS, NATS = (RESULTS["columns"].index(name) for name in ("bits a weight", "nats a token"))
rows = [row for row in RESULTS["rows"] if row[BITS] < 7.5]  # without int8, whose 8.1 bits lose next to nothing
uniform = [row for row in rows if row[1] == "all weights"]
smallest = min(uniform, key=lambda row: row[BITS])

figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, color, marker in (("kfac", "#b45309", "s"), ("output", OURS, "o")):
    chosen = [smallest, *(row for row in rows if row[0] == name and row[1] == "random ids")]
    points = sorted((row[BITS], row[NATS]) for row in chosen)
    axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=f'fit, by "{name}"')
axis.plot(*zip(*((row[BITS], row[NATS]) for row in uniform), strict=True), "D", color=OTHER, label="one format")
for row in uniform:
    axis.annotate(row[0], (row[BITS], row[NATS]), (7, 4), textcoords="offset points")
axis.set_title("Nats a token lost", loc="left")
axis.set_xlabel("bits a weight, with scales")
axis.set_ylim(0, 1.12 * max(row[NATS] for row in rows))
axis.legend(frameon=False)
save(figure, "fit_stories")
