"""commit: quantized weights in models that share modules, tie weights, read weights or refer to them."""

import copy

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from bigq import QuantizationConfig, QuantizedLinear, load_and_quantize_model
from dequantized import dequantized


class TestSharing:
    def test_one_linear_under_two_names_stays_one(self, tiny, empty, tmp_path, ids):
        class Shared(tiny):
            def __init__(self):
                super().__init__()
                self.blocks[2] = self.blocks[0]

        plain = Shared()
        for keep in ("blocks.0.", "blocks.2."):  # a checkpoint has either name, or both
            drop = "blocks.2." if keep == "blocks.0." else "blocks.0."
            state = {name: t.clone() for name, t in plain.state_dict().items() if not name.startswith(drop)}
            save_file(state, tmp_path / "model.safetensors")
            model = load_and_quantize_model(empty(Shared), tmp_path, QuantizationConfig("nf4"), "cpu")
            assert model.blocks[2] is model.blocks[0]
            assert model.blocks[2].up is model.blocks[0].up
            Accelerator().save_model(model, tmp_path / keep)
            again = load_and_quantize_model(empty(Shared), tmp_path / keep, device_map="cpu")
            assert torch.equal(again(ids), model(ids))

    @pytest.mark.parametrize("keep", ["embed.weight", "head.weight", None])
    def test_ties_stay_ties(self, tiny, empty, tmp_path, ids, keep):
        plain = tiny(tied=True)
        state = {name: t.clone() for name, t in plain.state_dict().items()}
        for name in {"embed.weight", "head.weight"} - {keep} if keep else ():
            del state[name]
        save_file(state, tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(tiny, tied=True), tmp_path, QuantizationConfig("int8"), "cpu")
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, plain.head.weight)


class TestTorchModels:
    def test_transformer_encoder_layers_run_their_linears(self, tmp_path, empty):
        def build():
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            return nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2), "head": nn.Linear(32, 4)})

        plain = build().eval()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(build), tmp_path, QuantizationConfig("nf4"), "cpu").eval()
        assert isinstance(model["body"].layers[1].linear2, QuantizedLinear)
        assert type(model["body"].layers[1].self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        x = torch.randn(2, 5, 32)
        expected = dequantized(model, plain)
        with torch.no_grad():
            torch.testing.assert_close(model["body"](x), expected["body"](x), rtol=1e-4, atol=1e-4)

    def test_an_attention_stays_itself_and_runs_in_the_dtype_of_the_load(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
                self.up, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

            def forward(self, x):
                return self.head(self.up(self.attention(x, x, x)[0]))

        model = load_and_quantize_model(Model().eval(), None, QuantizationConfig("nf4", dtype="bf16"), "cpu")
        quantized = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
        assert quantized == ["up"]
        assert model(torch.randn(2, 3, 16).bfloat16()).isfinite().all()

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu", "rnn": "disk", "up": "disk"}], ids=["cpu", "disk"])
    def test_recurrent_layers_follow_their_weights(self, tmp_path, empty, device_map):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.up, self.head = nn.LSTM(8, 8, num_layers=2), nn.Linear(8, 8), nn.Linear(8, 4)

            def forward(self, x):
                return self.head(self.up(self.rnn(x)[0]))

        plain = Recurrent()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(
            empty(Recurrent),
            tmp_path,
            QuantizationConfig("nf4"),
            device_map,
            offload="quantized",
            offload_folder=tmp_path,
        )
        x = torch.randn(5, 2, 8)
        expected = dequantized(model, plain)(x)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)

    @pytest.mark.parametrize("also_called", [False, True], ids=["only read", "read and called"])
    def test_a_linear_whose_weight_its_parent_reads(self, tmp_path, empty, config, also_called):
        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.head = nn.Linear(72, 40), nn.Linear(40, 4)

            def forward(self, x):
                dtype, (rows, columns) = self.up.weight.dtype, self.up.weight.shape
                read = nn.functional.linear(x.to(dtype), self.up.weight, self.up.bias)
                read = read + x @ self.up.weight.t() + self.up.weight.abs().amax() + rows / columns
                return self.head(read + self.up(x) if also_called else read)

        plain = Reads()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(Reads), tmp_path, config, "cpu")
        assert type(model.up) is QuantizedLinear
        x = torch.randn(5, 72)
        expected = dequantized(model, plain)(x)
        error = (model(x) - expected).norm() / expected.norm()
        assert error < (2e-2 if config.weight_format().name == "int8" else 1e-5)

    def test_a_subclass_of_linear_stays_an_instance_of_its_class(self, tmp_path, empty):
        class Marked(nn.Linear):
            mark = "mine"

        def build():
            return nn.Sequential(Marked(40, 24), nn.ReLU(), nn.Linear(24, 4))

        plain = build()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = load_and_quantize_model(empty(build), tmp_path, QuantizationConfig("nf4"), "cpu")
        assert isinstance(model[0], Marked)
        assert isinstance(model[0], QuantizedLinear)
        assert model[0].mark == "mine"
        x = torch.randn(3, 40)
        expected = dequantized(model, plain)(x)
        torch.testing.assert_close(model(x), expected)
        copied = copy.deepcopy(model)
        assert type(copied[0]) is type(model[0])
        assert torch.equal(copied(x), model(x))

    def test_a_bare_linear(self, tmp_path, empty):
        plain = nn.Linear(40, 24)
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        model = empty(nn.Linear, in_features=40, out_features=24)
        assert load_and_quantize_model(model, tmp_path, QuantizationConfig("nf4"), "cpu") is model
        assert type(model) is QuantizedLinear
        x = torch.randn(3, 40)
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.dequantize(), plain.bias))
        Accelerator().save_model(model, tmp_path / "saved")
        again = empty(nn.Linear, in_features=40, out_features=24)
        assert torch.equal(load_and_quantize_model(again, tmp_path / "saved", device_map="cpu")(x), model(x))

    def test_what_refers_to_a_linear_follows_it(self, tmp_path, empty):
        """A closure, a list and a hook that were there before."""

        class Closure(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
                up = self.up
                self.listed = [up]
                self.run = lambda x: up(x)

            def forward(self, x):
                return self.head(self.run(x))

        save_file(Closure().state_dict(), tmp_path / "model.safetensors")
        model = empty(Closure)
        seen = []
        handle = model.up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
        load_and_quantize_model(model, tmp_path, QuantizationConfig("nf4"), "cpu")
        assert model.listed[0] is model.up
        assert model(torch.randn(2, 8)).isfinite().all()
        assert seen == [QuantizedLinear]
        handle.remove()
        model(torch.randn(2, 8))
        assert len(seen) == 1

    def test_odd_shapes(self, tmp_path, empty, configs):
        def build():
            return nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1, bias=False), nn.Linear(1, 3))

        plain = build()
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        for config in configs:
            model = load_and_quantize_model(empty(build), tmp_path, config, "cpu")
            x = torch.randn(4, 33)
            other = build()
            other.load_state_dict(plain.state_dict())
            expected = dequantized(model, other)(x)
            assert (model(x) - expected).norm() <= 0.02 * expected.norm()
