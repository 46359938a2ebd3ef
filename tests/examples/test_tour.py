"""examples/tour.ipynb runs from top to bottom and prints what it shows."""

import os
import re

import pytest

from pages import ROOT

NOTEBOOK = ROOT / "examples" / "tour.ipynb"
nbformat = pytest.importorskip("nbformat")


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell):
    """What a cell printed, whatever the digits are: they differ a little between CPUs."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d+(\.\d+)*(\+\w+)?", "0", text))


def test_it_is_saved_with_its_outputs_and_pictures():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}, "no errors"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert all(cell.outputs for cell in cells)
    assert "same outputs: True" in NOTEBOOK.read_text()
    assert "same vectors: True" in NOTEBOOK.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(nbclient|jupyter_client|zmq|traitlets)")
@pytest.mark.filterwarnings("ignore:Proactor")
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    paths = [str(ROOT), str(ROOT / "triton_kernels"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    saved, notebook = read(), read()
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    for before, after in zip(saved.cells, notebook.cells, strict=True):
        if before.cell_type == "code":
            assert printed(after) == printed(before), before.source
