"""headline.png: loading, offloading and decoding a Llama of 8B shape, beside the libraries that bigq replaces."""

import matplotlib.pyplot as plt
from style import FLOAT, OTHER, OURS, results, save

loading, offload, decode = results("loading"), results("offload_cpu"), results("decode")
PANELS = [
    (
        "Load 16 GB to NF4",
        "s",
        [
            ("accelerate +\nbitsandbytes", loading["accelerate + bitsandbytes, nf4"][0], OTHER),
            ("transformers +\nbitsandbytes", loading["transformers + bitsandbytes, nf4"][0], OTHER),
            ("bigq", loading["bigq, nf4, Triton imported before"][0], OURS),
        ],
    ),
    (
        "Forward, layers in host memory",
        "ms",
        [
            ("accelerate,\nbf16", offload["accelerate, bf16"][0], OTHER),
            ("bigq, bf16", offload["bigq, bf16 preserved"][0], OURS),
            ("bigq, NF4", offload["bigq, nf4 packed"][0], OURS),
        ],
    ),
    (
        "Decode one token",
        "ms",
        [
            ("bf16", decode["bf16"][2], FLOAT),
            ("bitsandbytes,\nNF4", decode["bitsandbytes nf4"][2], OTHER),
            ("bigq, NF4", decode["nf4"][2], OURS),
        ],
    ),
]

figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 2.4), layout="constrained")
for axis, (title, unit, bars) in zip(axes, PANELS, strict=True):
    names, values, colors = zip(*bars, strict=True)
    drawn = axis.barh(names, values, color=colors, height=0.62)
    axis.bar_label(
        drawn, [f"{value:.0f} {unit}" if value >= 20 else f"{value:.3g} {unit}" for value in values], padding=4
    )
    axis.set_title(title, loc="left")
    axis.set_xlim(0, max(values) * 1.3)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
save(figure, "headline")
