"""aliases and strays: tensors of a model that something beside its modules holds."""

import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import bigq.load_source
from bigq import QuantizationConfig, UnsupportedError, load_and_quantize_model
from bigq.model.aliases import aliases_of
from bigq.model.tree import ModelTree
from interrupts import interrupted_at, points_of

NF4 = QuantizationConfig("nf4")


class Net(nn.Module):
    """Keeps its gain and its table in a list, in a closure and in an attribute."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.gain = nn.Parameter(torch.randn(32))
        self.register_buffer("table", torch.randn(32))
        gain = self.gain
        self.listed, self.scale, self.original_table = [self.gain], lambda x: x * gain, [(self.table,)]

    def forward(self, x):
        return self.head(self.scale(self.linear(x)) + self.listed[0] + self.original_table[0][0])


def write(path, build):
    torch.manual_seed(7)
    plain = build().eval()
    save_file(plain.state_dict(), path / "model.safetensors")
    return plain


@pytest.mark.parametrize("skeleton", ["on meta", "with weights"])
def test_whoever_holds_a_parameter_holds_the_loaded_one(tmp_path, empty, skeleton):
    plain, x = write(tmp_path, Net), torch.randn(2, 32)
    model = (empty(Net) if skeleton == "on meta" else Net()).eval()
    gain, parameters = model.gain, list(model.parameters())
    load_and_quantize_model(model, tmp_path, NF4, "cpu")
    assert model.gain is gain is model.listed[0]
    assert torch.equal(gain, plain.gain)
    assert gain.requires_grad
    assert model.table is model.original_table[0][0]
    assert [p for p in model.parameters() if any(p is q for q in parameters)] != []
    assert torch.equal(model(x), load_and_quantize_model(plain, None, NF4, "cpu")(x))


def test_objects_of_a_tied_parameter_share_the_loaded_one(tmp_path, empty):
    """`init_empty_weights` makes two objects of it, and both may be held by something."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.first, self.second = nn.Linear(32, 32), nn.LayerNorm(32), nn.LayerNorm(32)
            self.second.weight = self.first.weight
            self.listed = [self.first.weight, self.second.weight]

    weight = torch.randn(32)
    plain = Tied()
    plain.first.weight.data = weight
    save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, tmp_path / "model.safetensors")
    model = empty(Tied)
    one, other = model.listed
    assert one is not other
    load_and_quantize_model(model, tmp_path, NF4, "cpu")
    assert model.first.weight is model.second.weight is one
    assert type(other) is nn.Parameter
    assert other.data_ptr() == one.data_ptr()
    assert torch.equal(other, weight)


def test_a_cast_in_place_is_followed(tmp_path):
    model = Net()
    gain = model.gain
    load_and_quantize_model(model, None, QuantizationConfig("nf4", dtype="bf16"), "cpu")
    assert model.gain is gain is model.listed[0]
    assert gain.dtype == torch.bfloat16


def test_an_optimizer_follows(tmp_path):
    write(tmp_path, Net)
    model = Net()
    optimizer = torch.optim.SGD([model.gain, model.head.weight], lr=1.0)
    load_and_quantize_model(model, tmp_path, NF4, "cpu")
    before = model.gain.detach().clone()
    model(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.gain, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_load_that_fails_gives_them_back(tmp_path, empty, monkeypatch, error):
    write(tmp_path, Net)
    for model in (empty(Net), Net()):
        gain, table = model.gain, model.table
        held, is_meta = table.clone(), gain.is_meta

        def fail(*args, **kwargs):
            raise error("on purpose")

        monkeypatch.setattr(bigq.load_source, "dispatch", fail)
        with pytest.raises(error, match="on purpose"):
            load_and_quantize_model(model, tmp_path, NF4, "cpu")
        assert model.gain is gain is model.listed[0]
        assert gain.is_meta == is_meta
        assert model.table is table
        assert torch.equal(table, held)


def test_an_interrupt_gives_them_back_wherever_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # one in a __del__ is swallowed
    write(tmp_path, Net)
    weights = Net().state_dict()

    def build():
        model = Net()
        model.load_state_dict(weights)
        model.gain.own = "of the model"
        return model

    def load(model):
        load_and_quantize_model(model, tmp_path, NF4, "cpu", progress=False)

    load(build())
    points = points_of(partial(load, build()), ("load_source", "model/aliases", "model/transaction"))
    restored = 0
    for point in points:
        model = build()
        gain, table = model.gain, model.table
        try:
            interrupted_at(point, partial(load, model))
        except KeyboardInterrupt:
            if hasattr(model, "quantization_report"):  # after the last step
                continue
            restored += 1
            assert model.gain is gain is model.listed[0], str(point)
            assert model.table is table, str(point)
            assert torch.equal(gain, weights["gain"]), str(point)
            assert gain.own == "of the model", str(point)
            assert torch.equal(table, weights["table"]), str(point)
    assert restored > 50


def test_what_nothing_else_holds_is_none(tiny, empty):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.twice = nn.LSTM(8, 8), nn.Linear(8, 8)
            self.again = self.twice

    for model in (tiny(), tiny(tied=True), empty(tiny), empty(tiny, tied=True), Recurrent(), empty(Recurrent)):
        assert aliases_of(ModelTree(model)) == []
    model = Net()
    assert {alias.names for alias in aliases_of(ModelTree(model))} == {("gain",), ("table",)}


def test_what_torch_cannot_exchange_stays_and_the_model_is_right(tmp_path):
    import weakref

    plain, model = write(tmp_path, Net), Net()
    reference = weakref.ref(model.gain)
    old = model.gain.detach().clone()
    load_and_quantize_model(model, tmp_path, NF4, "cpu")
    assert torch.equal(model.gain, plain.gain)
    assert torch.equal(reference(), old)


class Marked(nn.Parameter):
    """A Parameter of the user's own."""


def test_class_and_attributes_of_a_parameter_stay(tmp_path):
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.gain = Marked(torch.randn(32))
            self.gain.sharding = self.head.weight.sharding = ("rows", 2)

    write(tmp_path, Own)
    with torch.device("meta"):
        skeleton = Own()
    skeleton.table = torch.zeros(32)
    skeleton.original_table = [(skeleton.table,)]
    for model in (skeleton, Own()):
        del model.listed, model.scale
        load_and_quantize_model(model, tmp_path, QuantizationConfig("nf4", dtype="bf16"), "cpu")
        assert type(model.gain) is Marked
        assert type(model.head.weight) is nn.Parameter
        assert model.gain.sharding == model.head.weight.sharding == ("rows", 2)
        assert model.gain.dtype == torch.bfloat16


class TestStrays:
    def refused(self, build, tmp_path, words, config=NF4):
        write(tmp_path, build)
        with torch.device("meta"):
            model = build()
        before = dict(vars(model))
        with pytest.raises(UnsupportedError, match=words):
            load_and_quantize_model(model, tmp_path, config, "cpu")
        assert dict(vars(model)) == before

    @pytest.mark.parametrize("keep", [lambda t: t, lambda t: {"a": [(t,)]}], ids=["an attribute", "inside of others"])
    def test_a_plain_tensor_on_meta(self, tmp_path, keep):
        class Plain(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
                self.linear.steps = keep(torch.arange(3.0))

        where = r"linear\.steps" if keep(1) == 1 else r"linear\.steps\['a'\]\[0\]\[0\]"
        self.refused(Plain, tmp_path, rf"1 tensors on meta are no parameters or buffers.*: {where}; build the model")

    def test_a_weight_to_quantize(self, tmp_path, empty):
        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
                self.weights = [self.linear.weight]

        words = r"weights\[0\], which is linear\.weight; add them to skip_modules"
        self.refused(Listed, tmp_path, words)
        load_and_quantize_model(Listed(), None, NF4, "cpu")  # it keeps the numbers of the weight
        both = QuantizationConfig("nf4", skip_modules=["linear"], skip_defaults=False)
        model = load_and_quantize_model(empty(Listed), tmp_path, both, "cpu")
        assert model.weights[0] is model.linear.weight

    def test_what_a_hook_computes_is_none(self, tmp_path, empty):
        class Normed(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
                self.normed = nn.utils.weight_norm(nn.Linear(32, 32))
                self.pruned = prune.identity(nn.Linear(32, 32), "weight")

        with pytest.warns(FutureWarning, match="weight_norm"):
            write(tmp_path, Normed)
        with pytest.warns(FutureWarning, match="weight_norm"):
            skeleton = empty(Normed)
        model = load_and_quantize_model(skeleton, tmp_path, NF4, "cpu")
        assert model.pruned(model.normed(torch.randn(2, 32))).isfinite().all()
