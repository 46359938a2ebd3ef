"""Match: which tensor of a checkpoint becomes which of the model, in which dtype."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import CheckpointError, QuantizationConfig, QuantizedLinear, load_and_quantize_model

NF4 = QuantizationConfig("nf4")


class Net(nn.Module):
    """A linear, a head, and what `extra` adds."""

    def __init__(self, extra=lambda model: None):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        extra(self)
        self.head = nn.Linear(32, 4)


@pytest.fixture
def load(empty, tmp_path):
    """load(extra, changes, ...): a Net on meta, from its own state dict with `changes`, in which None takes away."""

    def load(extra, changes=None, config=NF4, **options):
        state = {**Net(extra).state_dict(), **(changes or {})}
        state = {name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}
        save_file(state, tmp_path / "model.safetensors")
        return load_and_quantize_model(empty(Net, extra=extra), tmp_path, config, "cpu", **options)

    return load


class TestBuffersThatNoFileHolds:
    def mask(self, model):
        model.register_buffer("mask", torch.arange(32) % 2 == 0, persistent=False)

    def test_a_stale_entry_of_a_file_is_ignored(self, load):
        model = load(self.mask, {"mask": torch.ones(7, dtype=torch.uint8)})
        assert torch.equal(model.mask, torch.arange(32) % 2 == 0)

    def test_one_on_meta_is_not_filled_from_a_stale_entry(self, tmp_path):
        save_file({**Net(self.mask).state_dict(), "mask": torch.ones(32)}, tmp_path / "model.safetensors")
        with torch.device("meta"):
            model = Net(self.mask)
        with pytest.raises(CheckpointError, match=r"mask: .*not persistent"):
            load_and_quantize_model(model, tmp_path, NF4, "cpu")

    def test_a_name_that_is_persistent_elsewhere_is_read(self, load):
        def extra(model):
            model.register_buffer("table", torch.zeros(3), persistent=False)
            model.register_buffer("same", model.table)  # one tensor

        model = load(extra, {"table": torch.full((3,), 9.0), "same": torch.ones(3)})
        assert model.table is model.same
        assert torch.equal(model.same, torch.ones(3))


class TestDtypes:
    @pytest.mark.parametrize(
        "own, found, expected",
        [
            (torch.tensor([True, False]), torch.tensor([2, 0], dtype=torch.uint8), torch.tensor([True, False])),
            (torch.tensor([1, 2]), torch.tensor([3, 4], dtype=torch.int32), torch.tensor([3, 4])),
            (torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4]), torch.tensor([3, 4], dtype=torch.uint8)),
        ],
        ids=["uint8 into bool", "int32 into int64", "int64 into uint8"],
    )
    def test_integers_and_flags_keep_the_models_dtype(self, load, own, found, expected):
        model = load(lambda model: model.register_buffer("own", own), {"own": found})
        assert torch.equal(model.own, expected)
        assert model.own.dtype == expected.dtype

    @pytest.mark.parametrize(
        "own, found, words",
        [
            (torch.int64, torch.complex64, "expected integers, found complex64"),
            (torch.bool, torch.float32, "expected integers, found float32"),
            (torch.complex64, torch.float32, "expected complex numbers, found float32"),
            (torch.float32, torch.complex64, "expected floating-point numbers, found complex64"),
            (torch.float32, torch.bool, "expected floating-point numbers, found bool"),
        ],
        ids=str,
    )
    def test_another_kind_of_number_is_refused(self, load, own, found, words):
        with pytest.raises(CheckpointError, match=rf"own in .*: {words}"):
            load(lambda model: model.register_buffer("own", torch.ones(2).to(own)), {"own": torch.ones(2).to(found)})

    def test_a_float8_table_of_the_models_own_keeps_its_dtype(self, load):
        table = torch.tensor([0.5, 3.0]).to(torch.float8_e4m3fn)
        config = QuantizationConfig("nf4", dtype="bf16")
        model = load(lambda model: model.register_buffer("own", table), config=config)
        assert model.own.dtype == torch.float8_e4m3fn
        assert torch.equal(model.own.float(), table.float())

    def test_a_complex_parameter_stays_trainable(self, load):
        def extra(model):
            model.phase = nn.Parameter(torch.full((3,), 1 + 2j))
            model.frozen = nn.Parameter(torch.full((3,), 2j), requires_grad=False)

        model = load(extra)
        assert torch.equal(model.phase, torch.full((3,), 1 + 2j))
        assert (model.phase.requires_grad, model.frozen.requires_grad) == (True, False)


class Frozen(nn.Module):
    """A batch norm that holds nothing but buffers, as detection models have it."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(32))


class TestStatistics:
    """Running statistics take the dtype of the parameters that they are computed with."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("held", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(32), Frozen], ids=["BatchNorm", "frozen"])
    def test_they_are_what_to_gives(self, load, norm, held, dtype):
        def extra(model):
            model.norm = norm()

        state = Net(extra).to(held).state_dict()
        model = load(extra, state, QuantizationConfig("nf4", dtype=dtype))
        expected = {name: tensor.dtype for name, tensor in norm().to(dtype).state_dict().items()}
        assert {name: tensor.dtype for name, tensor in model.norm.state_dict().items()} == expected

    def test_a_network_with_them_runs(self, load):
        def extra(model):
            model.norm = nn.BatchNorm1d(32)

        model = load(extra, Net(extra).half().state_dict(), QuantizationConfig("nf4", dtype="fp32")).eval()
        assert model.head(model.norm(model.linear(torch.randn(2, 32)))).dtype == torch.float32


class Routed(Net):
    """Names modules and a parameter that it needs in float32, in a submodule too."""

    _keep_in_fp32_modules = ("wo",)
    _keep_in_fp32_modules_strict = ("router.weight", "correction")

    def __init__(self):
        super().__init__(Routed.extra)

    def extra(self):
        self.wo, self.router, self.two = nn.Linear(32, 32), nn.Linear(32, 8, bias=False), nn.Linear(32, 32)
        self.register_buffer("correction", torch.zeros(8))


class TestFloat32OfTheModelsOwn:
    @pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_it_is_kept_and_made_so(self, empty, tmp_path, held, dtype, wrapped):
        build = (lambda: nn.Sequential(Routed(), nn.Linear(32, 4))) if wrapped else Routed
        save_file(build().to(held).state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(build), tmp_path, QuantizationConfig("nf4", dtype=dtype), "cpu")
        own = model[0] if wrapped else model
        assert own.wo.weight.dtype == own.wo.bias.dtype == own.router.weight.dtype == torch.float32
        assert own.correction.dtype == torch.float32
        assert own.two.bias.dtype == (dtype or held)
        assert isinstance(own.two, QuantizedLinear)
        assert not isinstance(own.wo, QuantizedLinear)
        assert not isinstance(own.router, QuantizedLinear)
        rules = {module.name.removeprefix("0."): module.rule for module in model.quantization_report.modules}
        assert rules["wo"] == "the model's own _keep_in_fp32_modules 'wo'"
        assert rules["router"] == "the model's own _keep_in_fp32_modules_strict 'router.weight'"
        x = torch.randn(2, 32, dtype=dtype or held)
        assert own.router(x.float()).dtype == torch.float32, "the code of such a model casts, and expects float32"
        if x.dtype == torch.float16:
            assert own.wo(x.float()).dtype == torch.float32
        else:
            assert own.wo(x).dtype == x.dtype, "in bfloat16 it does not know of it"

    def test_a_name_that_also_quantize_asks_for_is_not_kept(self, empty, tmp_path):
        save_file(Routed().state_dict(), tmp_path / "model.safetensors")
        config = QuantizationConfig("nf4", also_quantize=["router"])
        model = load_and_quantize_model(empty(Routed), tmp_path, config, "cpu")
        assert isinstance(model.router, QuantizedLinear)
        assert not isinstance(model.wo, QuantizedLinear)
