"""Models with tensors that are not dense, or have no shape yet: they load, or are refused by name."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import (
    CheckpointError,
    ConfigError,
    QuantizationConfig,
    QuantizedLinear,
    UnsupportedError,
    infer_device_map,
    load_and_quantize_model,
    memory_footprint,
    model_card,
    num_parameters,
)
from bigq.model.aliases import aliases_of
from bigq.model.tree import ModelTree

NF4 = QuantizationConfig("nf4")

NOT_DENSE = {
    "sparse": lambda: torch.eye(32).to_sparse(),
    "sparse_csr": lambda: torch.eye(32).to_sparse_csr(),
    "mkldnn": lambda: torch.eye(32).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
}


@pytest.fixture(params=NOT_DENSE.values(), ids=NOT_DENSE.keys())
def odd(request):
    """A tensor that is not dense."""
    return request.param()


class Holder(nn.Module):
    """Two linears and a buffer that is not dense."""

    def __init__(self, odd, persistent=False):
        super().__init__()
        self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.linear.register_buffer("odd", odd, persistent=persistent)

    def forward(self, x):
        return self.head(self.linear(x))


pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse"),  # torch's: it is in beta
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def rules_of(model):
    return {module.name: module.rule for module in model.quantization_report.modules}


def written(path, odd):
    plain = Holder(odd).eval()
    save_file(plain.state_dict(), path / "model.safetensors")
    return plain


class TestNotDense:
    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu", "linear": "disk"}, "auto"], ids=str)
    def test_a_buffer_stays_the_object_that_it_is(self, odd, tmp_path, device_map):
        plain, model, x = written(tmp_path, odd), Holder(odd).eval(), torch.randn(2, 32)
        model.held = [odd]
        load_and_quantize_model(
            model,
            tmp_path,
            NF4,
            device_map,
            offload="quantized",
            offload_folder=tmp_path / "off",
            max_memory={"cpu": "1GB"},
        )
        assert model.linear.odd is odd is model.held[0]
        assert torch.equal(model(x), load_and_quantize_model(plain, None, NF4, "cpu")(x))
        assert sum(memory_footprint(model).nbytes["cpu"].values()) > 0
        assert num_parameters(model) == 32 * 32 + 32 + 32 * 4 + 4

    @pytest.mark.parametrize("persistent", [False, True])
    def test_a_load_in_place_leaves_a_buffer_alone(self, odd, persistent):
        model = load_and_quantize_model(Holder(odd, persistent), None, NF4, "cpu")
        assert isinstance(model.linear, QuantizedLinear)
        assert model.linear.odd is odd

    def test_a_device_map_counts_it(self, odd):
        assert infer_device_map(Holder(odd), NF4, max_memory={"cpu": "1GB"}) == {"": "cpu"}

    def test_its_bytes_are_counted(self, odd):
        nbytes = {
            torch.sparse_coo: 32 * (2 * 8 + 4),
            torch.sparse_csr: 33 * 8 + 32 * (8 + 4),
            torch.strided: 18 * 4,  # nested
            torch.jagged: 18 * 4,
        }.get(odd.layout, 32 * 32 * 4)
        model = load_and_quantize_model(Holder(odd), None, NF4, "cpu")
        kept = memory_footprint(model).nbytes["cpu"]["kept"]
        assert kept == nbytes + 4 * (32 + 32 * 4 + 4)

    def test_a_module_that_renames_old_names_may_hold_it(self, odd, tmp_path):
        class Renames(Holder):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                if prefix + "old.weight" in state_dict:
                    state_dict[prefix + "linear.weight"] = state_dict.pop(prefix + "old.weight")
                super()._load_from_state_dict(state_dict, prefix, *args)

        state = Holder(odd).state_dict()
        save_file(
            {name.replace("linear.weight", "old.weight"): t for name, t in state.items()}, tmp_path / "m.safetensors"
        )
        model = Renames(odd)
        model.register_buffer("own", odd, persistent=False)
        model = load_and_quantize_model(model, tmp_path / "m.safetensors", NF4, "cpu")
        assert isinstance(model.linear, QuantizedLinear)

    def test_one_that_a_checkpoint_holds_is_refused(self, tmp_path):
        plain = Holder(torch.eye(32).to_sparse(), persistent=True)
        torch.save(plain.state_dict(), tmp_path / "model.pt")
        model = Holder(torch.eye(32).to_sparse(), persistent=True)
        words = r"linear\.odd in .*: expected a dense tensor of the model.*found one that is torch\.sparse_coo"
        with pytest.raises(CheckpointError, match=words):
            load_and_quantize_model(model, tmp_path / "model.pt", NF4, "cpu")
        assert type(model.linear) is nn.Linear

    def test_one_that_a_checkpoint_lacks_is_missing(self, tmp_path):
        written(tmp_path, torch.eye(32).to_sparse())
        model = Holder(torch.eye(32).to_sparse(), persistent=True)
        with pytest.raises(CheckpointError, match=r"linear\.odd: expected \[32, 32\].*strict=False keeps"):
            load_and_quantize_model(model, tmp_path, NF4, "cpu")
        load_and_quantize_model(model, tmp_path, NF4, "cpu", strict=False)
        assert model.linear.odd.is_sparse

    def test_a_linear_with_a_sparse_weight_is_kept(self):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
        weight = nn.Parameter(model[1].weight.detach().to_sparse_csr(), requires_grad=False)
        model[1].weight, x = weight, torch.randn(2, 32)
        expected = model[1](x)
        load_and_quantize_model(model, None, NF4, "cpu")
        assert model[1].weight is weight
        assert torch.equal(model[1](x), expected)
        assert rules_of(model)["1"] == "its weight is not dense"
        nbytes = sum(part.nbytes for part in (weight.crow_indices(), weight.col_indices(), weight.values()))
        assert f"| `*.weight` | float32 | 2 | 1,152 | {nbytes + 4 * 128:,} |" in str(model_card(model))
        named = QuantizationConfig("nf4", also_quantize=["1.weight"])
        again = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        again[1].weight = weight
        with pytest.raises(ConfigError, match=r"also_quantize '1\.weight' matches no floating-point .* that is dense"):
            load_and_quantize_model(again, None, named, "cpu")

    def test_a_sparse_weight_that_a_checkpoint_lacks_is_the_models_own(self, tmp_path):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 4))
        weight = model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse_csr(), requires_grad=False)
        save_file({name: t for name, t in model.state_dict().items() if name != "1.weight"}, tmp_path / "m.safetensors")
        load_and_quantize_model(model, tmp_path / "m.safetensors", NF4, "cpu", strict=False)
        assert model[1].weight is weight
        assert isinstance(model[0], QuantizedLinear)


class TestLazy:
    @pytest.fixture
    def build(self):
        def make():
            return nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(32), nn.LazyBatchNorm1d(), nn.Linear(32, 4))

        return make

    def test_one_that_was_never_called_is_refused_by_name(self, build, tmp_path):
        full = build()
        full(torch.randn(2, 32))
        save_file(full.state_dict(), tmp_path / "model.safetensors")
        words = r"6 tensors of Sequential have no shapes.*: 1\.weight, 1\.bias, 2\.weight.*call the model once"
        for call in (
            lambda model: load_and_quantize_model(model, tmp_path, NF4, "cpu"),
            lambda model: load_and_quantize_model(model, None, NF4, "cpu"),
            lambda model: infer_device_map(model, NF4),
            memory_footprint,
        ):
            model = build()
            with pytest.raises(UnsupportedError, match=words):
                call(model)
            assert type(model[0]) is nn.Linear
            assert nn.parameter.is_lazy(model[1].weight)

    def test_one_that_was_called_is_a_linear(self, build):
        model, x = build().eval(), torch.randn(2, 32)
        model(x)
        load_and_quantize_model(model, None, NF4, "cpu")
        assert isinstance(model[1], QuantizedLinear)
        assert model(x).isfinite().all()

    def test_one_that_only_has_its_numbers_is_kept(self, build):
        full, model, x = build().eval(), build().eval(), torch.randn(2, 32)
        full(x)
        model.load_state_dict(full.state_dict())
        load_and_quantize_model(model, None, NF4, "cpu")
        assert "lazy module" in rules_of(model)["1"]
        assert torch.equal(
            model(x), load_and_quantize_model(full, None, QuantizationConfig("nf4", skip_modules=["1"]), "cpu")(x)
        )


def test_tensors_of_script_modules_are_no_aliases():
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    held = list(model.parameters())
    assert {names for names, _ in aliases_of(ModelTree(model))} == {("0.weight",), ("0.bias",)}
    del held
    assert aliases_of(ModelTree(model)) == []


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("also_quantize", [[], ["embed"], ["head"]], ids=str)
def test_a_file_that_holds_both_names_of_a_tied_tensor_loads(tiny, empty, ids, tmp_path, suffix, also_quantize):
    plain = tiny(tied=True)
    both = {name: tensor.detach().clone() for name, tensor in plain.state_dict().items()}
    assert {"embed.weight", "head.weight"} <= both.keys()
    path = tmp_path / f"model.{suffix}"
    torch.save(both, path) if suffix == "pt" else save_file(both, path)
    config = QuantizationConfig("nf4", also_quantize=also_quantize)
    model = load_and_quantize_model(empty(tiny, tied=True), path, config, "cpu")
    assert torch.equal(model(ids), load_and_quantize_model(plain, None, config, "cpu")(ids))
