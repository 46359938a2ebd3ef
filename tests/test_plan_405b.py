"""The plan of docs/many-gpus.md for a model of 405B parameters: its numbers follow from the sizes of the model."""

import re

import pytest

from bigq import NF4
from pages import ROOT

H, INNER, LAYERS, KEYS, WORDS = 16384, 53248, 126, 8 * 128, 128256
NODES, GPUS, TOKENS = 8, 8, 2048
NVLINK, NETWORK, OPERATIONS, DRIVES, SHARED = 450.0, 50.0, 400e12, 10.0, 100.0  # GB/s, but for OPERATIONS
SHAPES = [(H, H), (KEYS, H), (KEYS, H), (H, H), (INNER, H), (INNER, H), (H, INNER)]
WEIGHTS = LAYERS * sum(n * k for n, k in SHAPES)
QUANTIZED = LAYERS * sum(spec.nbytes for shape in SHAPES for spec in NF4().state_spec(shape).values()) / 1e9
KEPT = 2 * 2 * WORDS * H / 1e9
CHECKPOINT = 2 * WEIGHTS / 1e9 + KEPT
ADAPTER = 16 * LAYERS * sum(n + k for n, k in SHAPES)
SUMS = 6 * LAYERS * 2 * H * GPUS * TOKENS * 2 * (1 - 1 / GPUS) / 1e9
SECTION = (ROOT / "docs" / "many-gpus.md").read_text().partition("### A plan for 405B")[2]


def gathered(shards):
    return 2 * QUANTIZED * (1 - 1 / shards)


ROWS = {
    "weights on a GPU": [(QUANTIZED + KEPT) / GPUS, (QUANTIZED + KEPT) / (NODES * GPUS), (QUANTIZED + KEPT) / GPUS],
    "blocks that are whole": [2 * QUANTIZED / LAYERS, 2 * QUANTIZED / LAYERS, 0],
    "received by a GPU": [gathered(GPUS), gathered(NODES * GPUS), 0],
    "of these from other nodes": [0, gathered(NODES), 0],
    "seconds for that": [gathered(GPUS) / NVLINK, gathered(NODES) / NETWORK, 0],
    "sums of activations": [0, 0, SUMS],
    "seconds for them": [0, 0, SUMS / NVLINK],
    "seconds to compute": [6 * WEIGHTS * TOKENS / OPERATIONS] * 3,
}
SENTENCES = {
    r"W = ([\d.]+)e9": WEIGHTS / 1e9,
    r"Q = ([\d.]+) GB": QUANTIZED,
    r"in bfloat16, ([\d.]+) GB": KEPT,
    r"checkpoint has ([\d.]+) GB": CHECKPOINT,
    r"gathers takes (\d+) %": 100 * (gathered(GPUS) / NVLINK) / (6 * WEIGHTS * TOKENS / OPERATIONS),
    r"has (\d+)e6 numbers": ADAPTER / 1e6,
    r"are ([\d.]+) GB in a step": 4 * ADAPTER / 1e9,
    r"from each GPU: ([\d.]+) s": 4 * ADAPTER / 1e9 / GPUS * 2 * (1 - 1 / NODES) / NETWORK,
    r"once: (\d+) s": CHECKPOINT / DRIVES,
    r"own drives, (\d+) s": NODES * CHECKPOINT / SHARED,
    r"saved quantized, has ([\d.]+) GB": QUANTIZED + KEPT,
    r"a GPU holds (\d+) GB": (QUANTIZED + KEPT) / GPUS,
    r"one more weight, ([\d.]+) GB": INNER * H * 4.5 / 8 / 1e9,
    r"GB: (\d+) s and": (QUANTIZED + KEPT) / DRIVES,
    r"s and (\d+) s": NODES * (QUANTIZED + KEPT) / SHARED,
}


def printed(value, like):
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table(row):
    cells = re.search(rf"^\| {row}[^|]*\|[^|]*\|(.*)\|$", SECTION, flags=re.MULTILINE).group(1).split("|")
    assert [cell.strip() for cell in cells] == [printed(v, c.strip()) for v, c in zip(ROWS[row], cells, strict=True)]


@pytest.mark.parametrize("pattern", SENTENCES)
def test_a_number_of_the_text(pattern):
    found = re.search(pattern, " ".join(SECTION.split())).group(1)
    assert found == printed(SENTENCES[pattern], found)
