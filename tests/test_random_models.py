"""Random module trees under random device maps: every placement computes the bits of the resident model."""

import copy
import pickle
import random

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from bigq import QuantizationConfig, load_and_quantize_model, materialize, memory_footprint, plan
from dequantized import dequantized

WIDTH = 8


class Part(nn.Module):
    """A random piece of a model, with parameters and buffers of its own now and then; `pool` holds parts to share."""

    def __init__(self, draw: random.Random, depth: int, pool: list["Part"]) -> None:
        super().__init__()
        self.kind = draw.choice(
            ["linear", "sequential", "list", "dict", "residual", "rnn", "encoder"][: 7 if depth else 1]
        )
        if draw.random() < 0.4:
            self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        if draw.random() < 0.4:
            self.register_buffer("offset", torch.linspace(0, draw.random(), WIDTH), persistent=draw.random() < 0.6)

        def child() -> Part:
            if pool and draw.random() < 0.15:
                return draw.choice(pool)
            pool.append(Part(draw, depth - 1, pool))
            return pool[-1]

        if self.kind == "linear":
            self.body = nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.5)
        elif self.kind == "sequential":
            self.body = nn.Sequential(child(), nn.Tanh(), child())
        elif self.kind == "list":
            self.body = nn.ModuleList(child() for _ in range(draw.randint(1, 3)))
        elif self.kind == "dict":
            self.body = nn.ModuleDict({"one": child(), "two": nn.Linear(WIDTH, WIDTH)})
        elif self.kind == "residual":
            self.body, self.norm = child(), nn.LayerNorm(WIDTH)
        elif self.kind == "rnn":
            self.body = nn.GRU(WIDTH, WIDTH)
        else:
            self.body = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "list":
            for part in self.body:
                x = part(x)
        elif self.kind == "dict":
            x = self.body["one"](x) + self.body["two"](x)
        elif self.kind == "residual":
            x = x + self.body(self.norm(x))
        elif self.kind == "rnn":
            x = self.body(x)[0]
        else:
            x = torch.tanh(self.body(x))
        return x * getattr(self, "gain", 1.0) + getattr(self, "offset", 0.0)


class RandomModel(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw, pool = random.Random(seed), []
        self.first, self.second, self.head = Part(draw, 3, pool), Part(draw, 3, pool), nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x))) * self.scale


@pytest.fixture
def load(empty, tmp_path):
    def build(seed, weights, config, device_map, **options):
        options = {"offload": "quantized", "offload_folder": tmp_path / "offload", **options}
        skeleton = empty(RandomModel, seed=seed).eval()
        planned = plan(skeleton, config, device_map, weights_location=weights, **options)
        model = load_and_quantize_model(skeleton, weights, config, device_map, **options)
        assert planned.nbytes == memory_footprint(model).nbytes
        return model

    return build


def random_case(seed, folder):
    """(draw, model with its weights, folder of its checkpoint, config, names a device map may have, input)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    plain = RandomModel(seed).eval()
    save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, folder / "model.safetensors")
    config = draw.choice([QuantizationConfig(name) for name in ("nf4", "fp4", "int8")])
    names = [name for name, _ in plain.named_modules() if name] + [name for name, _ in plain.named_parameters()]
    return draw, plain, config, names, torch.randn(2, 5, WIDTH)


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_every_placement_computes_the_same_bits(seed, load, tmp_path):
    draw, plain, config, names, x = random_case(seed, tmp_path)
    resident = load(seed, tmp_path, config, "cpu")
    expected = resident(x)
    for round_ in range(2):
        device_map = {"": "cpu", **{name: draw.choice(["disk", "disk", "cpu"]) for name in draw.sample(names, k=4)}}
        model = load(seed, tmp_path, config, device_map)
        assert torch.equal(model(x), expected), device_map
        assert torch.equal(model(x), expected), device_map
        Accelerator().save_model(model, tmp_path / f"saved{round_}")
        again = load(seed, tmp_path / f"saved{round_}", None, {"": "cpu", draw.choice(names): "disk"})
        assert torch.equal(again(x), expected)
    budget = int(memory_footprint(resident).total_nbytes * draw.random())
    assert torch.equal(load(seed, tmp_path, config, "auto", max_memory={"cpu": budget})(x), expected)

    out = dequantized(resident, plain)(x)
    error = (expected - out).norm() / out.norm()
    assert error < (0.05 if config.weight_format().name == "int8" else 1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_offloaded_as_it_is_or_packed_it_computes_and_trains_as_at_home(seed, load, tmp_path):
    """What is materialized is the reference: the same tensors without hooks."""
    draw, _, config, names, x = random_case(seed, tmp_path)
    home = 0 if torch.cuda.is_available() else "cpu"
    device_map = {"": home, **{name: draw.choice(["disk", "cpu"]) for name in draw.sample(names, k=5)}}
    model = load(seed, tmp_path, config, device_map, offload=draw.choice(["quantized", "preserve"]))
    other = pickle.loads(pickle.dumps(model)) if draw.random() < 0.5 else copy.deepcopy(model)
    plain_math = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    with torch.backends.cudnn.flags(enabled=False), plain_math:  # cuDNN's RNNs need a training mode and flat weights
        with torch.no_grad():
            outputs = [model(x) for _ in range(3)] + [other(x)]
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        materialize(model)
        with torch.no_grad():
            expected = model(x.to(home)).cpu()
        assert all(torch.equal(out, expected) for out in outputs)
        again = x.clone().to(home).requires_grad_()
        model(again).square().sum().backward()
        torch.testing.assert_close(leaf.grad, again.grad.cpu(), rtol=1e-4, atol=1e-6)  # attention fused, and not
