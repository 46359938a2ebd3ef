"""examine_releases: the tested releases are those that the documents name, and others are said to be others."""

import re
from pathlib import Path

import pytest

from bigq.doctor import releases

ROOT = Path(__file__).parents[2]


def _found(monkeypatch, **installed):
    monkeypatch.setattr(releases, "installed_version", lambda name: installed.get(name))
    return {library.name: library for library in releases.examine_releases()}


def test_the_pairs_are_those_of_the_design_document():
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| (\w+)", (ROOT / "docs/design.md").read_text(), flags=re.MULTILINE)
    in_part = ("no", "most")  # not at all, or some things do not work
    assert tuple((torch, triton) for torch, triton, tested in rows if tested not in in_part) == releases.TESTED_PAIRS


def test_the_ranges_are_those_of_the_requirements():
    text = (ROOT / "docs/index.md").read_text()
    assert (
        re.search(r"^\| transformers \| ([\d.]+) to ([\d.]+)", text, flags=re.MULTILINE).groups()
        == (releases.RANGES["transformers"])
    )
    found = re.search(r"^\| diffusers, PEFT \| ([\d.]+) and ([\d.]+)\.", text, flags=re.MULTILINE).groups()
    assert found == (releases.RANGES["diffusers"][0], releases.RANGES["peft"][0])


@pytest.mark.parametrize(
    "torch, triton, status, advice",
    [
        ("2.13.0+cu130", "3.7.1", "tested", None),
        ("2.13.1", "3.7.9", "tested", None),
        ("2.13.0", "3.8.0", "not tested", "torch 2.13.0 with Triton 3.7.1"),
        ("2.10.0", "3.5.1", "not tested", "install releases that are tested together"),
        ("2.14.1", None, "missing", "pip install triton"),
    ],
    ids=str,
)
def test_torch_and_triton_belong_together(torch, triton, status, advice, monkeypatch):
    found = _found(monkeypatch, torch=torch, triton=triton)["triton"]
    assert found.status == status
    assert advice is None if found.advice is None else advice in found.advice


def test_other_libraries(monkeypatch):
    found = _found(
        monkeypatch, torch="2.13.0", triton="3.7.1", transformers="5.24.1", peft="0.21.2", accelerate="1.9.0"
    )
    said = {name: (library.status, library.advice) for name, library in found.items()}
    assert said["transformers"] == ("not tested", "transformers 5.17 to 5.23 is tested")
    assert said["peft"] == ("tested", None)
    assert said["accelerate"] == ("not tested", "accelerate 1.10 or later is tested")
    assert said["diffusers"] == ("not installed", None)
    assert _found(monkeypatch, torch="2.13.0", triton="3.7.1")["accelerate"].advice == "pip install 'accelerate>=1.10'"
