"""Fixtures and gates shared by every test."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined: kernel tests then run on CPU tensors in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    parser.addoption("--assets", type=Path, default=default, help="folder with the story models and texts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def assets(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.config.getoption("--assets")
    if not folder.is_dir():
        pytest.skip(f"no assets folder at {folder}: pass --assets")
    return folder


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and friends return NaN (or the largest integer): an element left unwritten fails a test."""

    def poison(function):
        def poisoned(*args, **kwargs):
            out = function(*args, **kwargs)
            if out.device.type != "meta" and out.numel():
                if out.is_floating_point():
                    out.fill_(float("nan"))
                elif out.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
                    out.fill_(torch.iinfo(out.dtype).max)
            return out

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
