"""Tensor parallelism: processes that hold slices of quantized linears compute what one process computes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigq import FP4, NF4, ConfigError, Int8, QuantizationConfig, UnsupportedError, load_and_quantize_model
from ranks import mesh_of, own_device, run_ranks

FORMATS = {
    "nf4": NF4(),
    "nf4-double-quant": NF4(double_quant=True),
    "fp4": FP4(block_size=32),
    "int8": Int8(),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WIDTH, INNER = 64, 256


class Block(nn.Module):
    """A gated block, whose first weight is made of two."""

    def __init__(self, inner=INNER):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate_up = nn.Linear(WIDTH, 2 * inner)
        self.down = nn.Linear(inner, WIDTH)

    def forward(self, x):
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def model_of(weight_format, dtype=torch.float32, inner=INNER):
    torch.manual_seed(0)
    model = nn.Sequential(Block(inner), Block(inner)).to(own_device(), dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    if weight_format is None:
        return model
    model = load_and_quantize_model(model, None, QuantizationConfig(weight_format), own_device())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return model


def plan():
    from bigq.integrations.tensor_parallel import ColwiseParallel, RowwiseParallel

    return {"*.gate_up": ColwiseParallel(parts=2), "*.down": RowwiseParallel()}


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def run(model, x):
    """The output, and the gradients of x, of a replicated bias and of one that is added to a sum."""
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out.square().mean().backward()
    down = model[0].down
    bias = down.bias if down.bias is not None else down.summed_bias
    return [out.detach(), x.grad, model[0].norm.bias.grad, bias.grad]


def inputs(dtype=torch.float32):
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1)).to(own_device(), dtype)


def decoded(model):
    """The float64 model with the decoded weights."""
    dense = model_of(None, torch.float64)
    for block, quantized in zip(dense, model, strict=True):
        block.load_state_dict(
            {name: p for name, p in quantized.state_dict().items() if name.startswith("norm") or name.endswith("bias")},
            strict=False,
        )
        for leaf in ("gate_up", "down"):
            getattr(block, leaf).weight.data = getattr(quantized, leaf).dequantize(torch.float32).double()
    return dense


def _compare(rank):
    from torch.distributed.tensor import parallel as torchs

    from bigq.integrations.tensor_parallel import parallelize_module

    mesh = mesh_of(2)
    found = {}
    for name, weight_format in FORMATS.items():
        for dtype in DTYPES.values():
            one, several = (model_of(weight_format, dtype) for _ in range(2))
            nbytes = sum(p.nbytes for p in several.parameters())
            exact = run(decoded(one), inputs(torch.float64))
            parallelize_module(several, mesh, plan())
            expected, got = run(one, inputs(dtype)), run(several, inputs(dtype))
            with torch.no_grad():
                again = several(inputs(dtype))
                copied = copy.deepcopy(several)(inputs(dtype))
            found[f"{name}-{dtype}"] = {
                "errors": [(error(a, e), error(b, e)) for a, b, e in zip(got, expected, exact, strict=True)],
                "same": torch.equal(again, got[0]) and torch.equal(copied, again),
                "nbytes": sum(p.nbytes for p in several.parameters()) / nbytes,
                "state": sorted(several.state_dict()),
                "weight": torch.equal(
                    several[1].down.dequantize(), one[1].down.dequantize()[:, rank * 128 : rank * 128 + 128]
                ),
            }
    found["layouts"] = _layouts(mesh, torchs)
    found["refused"] = _refused(mesh)
    return found


def _layouts(mesh, torchs):
    """The errors of a float model's plan with sequence parallelism, and of gathered outputs and split inputs."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from bigq.integrations.tensor_parallel import parallelize_module

    class Gate(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + x

    def build():
        torch.manual_seed(0)
        layers = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)]
        return load_and_quantize_model(
            nn.Sequential(*layers), None, QuantizationConfig("nf4", skip_modules=[]), own_device()
        )

    x, found = inputs(), {}
    leaf = x.clone().requires_grad_()
    expected = build()(leaf)
    expected.square().mean().backward()

    def compare(name, layer_plan, given, gather):
        given = given.clone().requires_grad_()
        model = parallelize_module(build(), mesh, layer_plan)
        out = gather(model(given))
        out.square().mean().backward()
        found[name] = error(out, expected), given.grad, leaf.grad

    whole = {
        "1": torchs.ColwiseParallel(output_layouts=Replicate()),
        "3": torchs.RowwiseParallel(input_layouts=Replicate()),
    }
    compare("gathered", whole, x, lambda out: out)
    sequence = {
        "0": torchs.SequenceParallel(),
        "1": torchs.ColwiseParallel(input_layouts=Shard(1)),
        "3": torchs.RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    rank = mesh.get_local_rank()
    compare("sequence", sequence, x.chunk(2, dim=1)[rank], DTensor.full_tensor)
    by_rows = build()
    parallelize_module(by_rows, mesh, {"1": torchs.ColwiseParallel()})
    found["gathered"] = found["gathered"][0], error(found["gathered"][1], found["gathered"][2])
    part = found["sequence"][2].chunk(2, dim=1)[rank]
    found["sequence"] = found["sequence"][0], error(found["sequence"][1], part)
    with torch.no_grad():  # K / 2 = 80 is not a multiple of 64
        one, several = (model_of(NF4(), inner=160) for _ in range(2))
        parallelize_module(several, mesh, plan())
        only = several[0].down
        found["by rows"] = (only.in_features, only.out_features), error(several(x), one(x))
    return found


def _refused(mesh):
    from bigq.integrations.expert_parallel import ExpertParallel
    from bigq.integrations.tensor_parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def message(make, layer_plan):
        try:
            parallelize_module(make(), mesh, layer_plan)
        except (UnsupportedError, ConfigError) as refusal:
            return str(refusal)
        return "not refused"

    def embedding():
        config = QuantizationConfig("nf4", also_quantize=["0"])
        return load_and_quantize_model(nn.Sequential(nn.Embedding(8, 64)), None, config, own_device())

    def narrow():
        return load_and_quantize_model(
            nn.Sequential(nn.Linear(64, 1)), None, QuantizationConfig("nf4", skip_modules=[]), own_device()
        )

    def parallelized():
        return parallelize_module(model_of(NF4()), mesh, plan())

    def on_meta():
        model = model_of(NF4())
        return model.to("meta")

    return {
        "embedding": message(embedding, {"0": RowwiseParallel()}),
        "narrow": message(narrow, {"0": ColwiseParallel()}),
        "twice": message(parallelized, plan()),
        "meta": message(on_meta, plan()),
        "parts": message(lambda: model_of(NF4()), {"*.gate_up": ColwiseParallel(parts=(100, 100))}),
        "float": message(lambda: model_of(None), {"*.gate_up": ColwiseParallel(parts=2)}),
        "experts": message(lambda: model_of(NF4()), {"*.gate_up": ExpertParallel()}),
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return run_ranks(_compare, tmp_path_factory.mktemp("tensor-parallel"), gpus=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients_are_as_exact_as_those_of_one_process(compared, name, dtype):
    """Against the decoded weights in float64. Sums are added in another order, and int8 rounds x by other maxima."""
    for found in compared:
        case = found[f"{name}-{DTYPES[dtype]}"]
        assert case["same"]
        for parallel, alone in case["errors"]:
            assert parallel <= 1.25 * alone + 2 * torch.finfo(DTYPES[dtype]).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_process_holds_its_slice(compared, name, dtype):
    for found in compared:
        case = found[f"{name}-{DTYPES[dtype]}"]
        assert case["weight"]  # as it was quantized: the numbers are those of the whole weight
        assert case["nbytes"] < (0.62 if name == "nf4-double-quant" else 0.58)  # norms and quant_state are whole


def test_a_state_dict_leaves_the_slices_out(compared):
    whole = {f"{i}.{name}" for i in range(2) for name in ("norm.weight", "norm.bias", "down.summed_bias")}
    for found in compared:
        assert set(found["nf4-torch.float32"]["state"]) == whole


@pytest.mark.parametrize("name", ["gathered", "sequence"])
def test_the_layouts_of_torch_mean_the_same(compared, name):
    for found in compared:
        assert all(value < 1e-6 for value in found["layouts"][name])


def test_a_weight_whose_blocks_span_the_border_is_cut_by_rows(compared):
    for found in compared:
        shape, off = found["layouts"]["by rows"]
        assert shape == (160, WIDTH // 2)
        assert off < 1e-6


@pytest.mark.parametrize(
    "case, words",
    {
        "embedding": "QuantizedEmbedding is not cut",
        "narrow": "too few for 2 processes",
        "twice": "parallelized already",
        "meta": "offloaded or on meta",
        "parts": "do not add up",
        "float": "not quantized",
        "experts": "for fused experts",
    }.items(),
)
def test_what_cannot_be_cut_is_refused(compared, case, words):
    for found in compared:
        assert words in found["refused"][case]
