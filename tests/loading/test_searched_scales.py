"""method="search": whichever way a model is loaded, each weight becomes what quantize_tensor makes of it."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bigq
from bigq import FP4, NF4, ConfigError, InputMoments, QuantizationConfig, load_and_quantize_model, quantize_tensor
from bigq.weight.quantized_module import QuantizedModule

FORMATS = {
    "nf4": NF4(),
    "fp4": FP4(block_size=32),
    "double-quant": NF4(double_quant=True),
}


class Model(nn.Module):
    """Neighbours that are alike, one of 3 MiB that comes in pieces, odd widths, and a tied pair."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 64)
        self.a, self.b, self.odd = nn.Linear(64, 40), nn.Linear(64, 40), nn.Linear(77, 9)
        self.large = nn.Linear(768, 1024)
        self.head = nn.Linear(64, 30, bias=False)
        self.head.weight = self.words.weight


def moments_of(model, *, without=()):
    """Moments that differ by weight and by feature, as those of real inputs do."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return InputMoments(
        {
            f"{name}.weight": 10.0 ** (torch.rand(m.in_features) * 4)
            for name, m in linears.items()
            if name not in without
        }
    )


def config_of(weight_format, moments, **settings):
    return QuantizationConfig(weight_format, method="search", moments=moments, **settings)


def assert_searched(loaded, model, weight_format, moments):
    """Each quantized weight of `loaded` is what quantize_tensor makes of that of `model`; returns how many."""
    floats = dict(model.named_parameters(remove_duplicate=False))
    modules = {name: module for name, module in loaded.named_modules() if isinstance(module, QuantizedModule)}
    for name, module in modules.items():
        # torch adds up the mean that double quantization stores in another order on a GPU
        is_double = getattr(weight_format, "double_quant", False)
        weight = floats[f"{name}.weight"].to(module.weight.device if is_double else "cpu")
        plain = QuantizationConfig(weight_format)
        expected = quantize_tensor(weight.data, plain)
        if f"{name}.weight" in moments:
            searched = QuantizationConfig(weight_format, method="search")
            expected = quantize_tensor(weight.data, searched, moments=moments[f"{name}.weight"])
        for part, tensor in expected.tensors.items():
            stored = getattr(module, f"weight_{part}")
            assert torch.equal(stored.data.cpu(), tensor.cpu()), (name, part)
    return len(modules)


def in_place(model, path, config):
    return load_and_quantize_model(copy.deepcopy(model), None, config, device_map="cpu")


def streamed(model, path, config):
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}, path)
    with torch.device("meta"):
        skeleton = Model()
    skeleton.head.weight = skeleton.words.weight
    return load_and_quantize_model(skeleton, path, config, device_map="cpu", read_budget=1 << 20, progress=False)


def pickled(model, path, config):
    path = path.with_suffix(".pt")
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    return load_and_quantize_model(Model(), path, config, device_map="cpu", progress=False)


def offloaded(model, path, config):
    places = {"": "cpu", "a": "disk", "large": "disk"}
    return load_and_quantize_model(copy.deepcopy(model), None, config, device_map=places, offload="quantized")


WAYS = {"in-place": in_place, "streamed": streamed, "pickled": pickled, "offloaded": offloaded}


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("load", WAYS.values(), ids=WAYS.keys())
def test_every_load_equals_quantize_tensor(load, weight_format, tmp_path):
    model = Model()
    moments = moments_of(model, without=("odd", "head"))
    loaded = load(model, tmp_path / "model.safetensors", config_of(weight_format, moments))
    assert assert_searched(loaded, model, weight_format, moments) == 4
    if weight_format == NF4():
        assert (loaded.large.absmax < 0).float().mean() > 0.3
        assert (loaded.odd.absmax > 0).all(), "without moments, so absmax"


def test_a_large_weight_comes_in_pieces_unless_its_scales_are_quantized_together(tmp_path, monkeypatch):
    model, counts = Model(), []
    plain = NF4.quantize_rows
    monkeypatch.setattr(
        NF4, "quantize_rows", lambda self, rows, **how: counts.append(len(rows)) or plain(self, rows, **how)
    )
    for double_quant, pieces in ((False, 3), (True, 1)):
        counts.clear()
        config = config_of(NF4(double_quant=double_quant), moments_of(model))
        streamed(model, tmp_path / "model.safetensors", config)
        large = [count for count in counts if count not in (40, 9)]
        assert sum(large) == 1024
        assert len(large) >= pieces
        assert (len(large) == 1) == double_quant


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_finds_the_same_bits(weight_format, dtype, tmp_path):
    model = Model().to(dtype)
    moments = moments_of(model)
    path, config = tmp_path / "model.safetensors", config_of(weight_format, moments)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}, path)
    skeleton = Model()
    loaded = load_and_quantize_model(skeleton, path, config, device_map=0, read_budget=1 << 20, progress=False)
    assert assert_searched(loaded, model, weight_format, moments) == 4
    loaded = load_and_quantize_model(copy.deepcopy(model).cuda(), None, config, device_map=0)
    assert assert_searched(loaded, model, weight_format, moments) == 4
    x = torch.randn(5, 768, device="cuda", dtype=dtype)
    dense = loaded.large.weight.dequantize()
    torch.testing.assert_close(loaded.large(x), nn.functional.linear(x, dense, loaded.large.bias), rtol=2e-2, atol=2e-2)


def test_tied_and_transposed_weights_and_stacks():
    model = Model()
    moments = moments_of(model)  # of the tied weight under the name of the head
    config = config_of(NF4(), moments, also_quantize=["words"])
    loaded = load_and_quantize_model(copy.deepcopy(model), None, config, device_map="cpu")
    expected = quantize_tensor(
        model.head.weight.data, QuantizationConfig("nf4", method="search"), moments=moments["head.weight"]
    )
    assert torch.equal(loaded.words.weight_packed.data, expected.tensors["packed"])
    assert loaded.words.weight_packed is loaded.head.weight_packed

    searched = QuantizationConfig("nf4", method="search")
    stack = nn.Module()
    stack.weight = nn.Parameter(torch.randn(3, 10, 70))
    weight, moments = stack.weight.data.clone(), InputMoments({"0.weight": torch.rand(70)})
    config = config_of(NF4(), moments, also_quantize=["0"])
    loaded = load_and_quantize_model(nn.Sequential(stack), None, config, device_map="cpu")
    expected = quantize_tensor(weight, searched, moments=moments["0.weight"])
    assert torch.equal(loaded[0].weight_packed.data, expected.tensors["packed"])

    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(12, 70)
    weight, moments = conv.weight.data.clone(), InputMoments({"0.weight": torch.rand(70)})
    loaded = load_and_quantize_model(nn.Sequential(conv), None, config_of(NF4(), moments), device_map="cpu")
    expected = quantize_tensor(weight.T.contiguous(), searched, moments=moments["0.weight"])
    assert torch.equal(loaded[0].weight_packed.data, expected.tensors["packed"])


def test_rules_search_4_bit_weights_and_leave_int8_alone():
    model = Model()
    moments = moments_of(model, without=("b",))
    config = QuantizationConfig("int8", rules={"a": NF4(), "b": "fp4"}, method="search", moments=moments)
    loaded = load_and_quantize_model(copy.deepcopy(model), None, config, device_map="cpu")
    said = {module.name: module.rule for module in loaded.quantization_report.modules}
    assert said["a"] == "rules 'a'; scales searched"
    assert said["b"] == "rules 'b'; absmax, because there are no moments: weight"
    assert said["large"] == "quantized"
    expected = quantize_tensor(
        model.a.weight.data, QuantizationConfig("nf4", method="search"), moments=moments["a.weight"]
    )
    assert torch.equal(loaded.a.weight_packed.data, expected.tensors["packed"])
    for name in ("b", "large"):
        plain = quantize_tensor(getattr(model, name).weight.data, QuantizationConfig("fp4" if name == "b" else "int8"))
        assert torch.equal(getattr(loaded, name).weight_packed.data, plain.tensors["packed"])


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
def test_saved_weights_are_reloaded_bit_for_bit_without_moments(double_quant, tmp_path):
    model = Model()
    config = config_of(NF4(double_quant=double_quant), moments_of(model))
    loaded = load_and_quantize_model(model, None, config, device_map="cpu")
    bigq.save_quantized(loaded, tmp_path)
    said = QuantizationConfig.from_dict(config.to_dict())
    assert said == config
    assert said.moments is None
    for asked in (None, said):
        again = load_and_quantize_model(Model(), tmp_path, asked, device_map="cpu", progress=False)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = Model()
    moments = moments_of(model)
    cases = [
        (None, r"method='search' needs to know how large the inputs of the weights are: pass moments=bigq\."),
        (InputMoments({"x.weight": torch.ones(64)}), r"no entry for any of the 4 weights to search, such as a\.weight"),
        (InputMoments({}), r"no entry for any of the 4 weights.*they have none"),
        (
            InputMoments({**moments, "a.weight": torch.ones(65)}),
            r"those of another model: a\.weight has 64 input features and 65 moments",
        ),
    ]
    for wrong, message in cases:
        with pytest.raises(ConfigError, match=message):
            load_and_quantize_model(model, None, config_of(NF4(), wrong), device_map="cpu")
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())


def test_a_weight_that_is_not_finite_is_refused():
    model = Model()
    with torch.no_grad():
        model.b.weight[3, 60] = float("nan")
    for double_quant in (False, True):
        config = config_of(NF4(double_quant=double_quant), moments_of(model))
        with pytest.raises(bigq.CheckpointError, match=r"b\.weight"):
            load_and_quantize_model(copy.deepcopy(model), None, config, device_map="cpu")


def test_a_write_to_the_weight_has_absmax():
    model = Model()
    loaded = load_and_quantize_model(model, None, config_of(NF4(), moments_of(model)), device_map="cpu")
    numbers = torch.randn(40, 64)
    loaded.a.weight = numbers
    assert torch.equal(loaded.a.weight_packed.data, quantize_tensor(numbers, "nf4").tensors["packed"])
    assert (loaded.a.absmax > 0).all()


def test_quantize_tensor_refuses_moments_that_do_not_fit():
    weight, config = torch.randn(4, 64), QuantizationConfig("nf4", method="search")
    for arguments, message in [
        ({}, "method='search' needs the moments of the tensor's inputs"),
        ({"moments": torch.ones(63)}, r"moments has 63 numbers; expected \[64\]"),
        ({"moments": torch.ones(1, 64)}, r"moments are torch.float32 \[1, 64\]; expected floating point \[K\]"),
        ({"moments": -torch.ones(64)}, r"negative, NaN or Inf at 64 of 64 input features \(0, 1, 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            quantize_tensor(weight, config, **arguments)
    with pytest.raises(ConfigError, match="moments beside method='absmax'"):
        quantize_tensor(weight, "nf4", moments=torch.ones(64))
