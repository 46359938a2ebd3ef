"""ScriptModules, which carry no hook: the module that calls one is lent its tensors."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import PlacementError, QuantizationConfig, load_and_quantize_model, materialize
from bigq.offload.dispatch import dispatch
from bigq.offload.space import is_file_backed

NF4 = QuantizationConfig("nf4")
RUNS_ON = 0 if torch.cuda.is_available() else "cpu"


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is on its way out
        return torch.jit.script(module)


class Scripted(nn.Module):
    """A model that calls modules of TorchScript, one of them inside of a block."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.scripted = scripted(nn.Linear(32, 32))
        self.nested = scripted(nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 32))))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), scripted(nn.Linear(32, 32))) for _ in range(3))

    def forward(self, x):
        x = self.nested(torch.relu(self.scripted(self.up(x))))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class TestScriptModules:
    """A ScriptModule carries no hook: the module that calls it is lent its tensors."""

    @pytest.fixture
    def load(self, empty, tmp_path):
        torch.manual_seed(1)
        save_file(Scripted().state_dict(), tmp_path / "model.safetensors")

        def build(device_map, **options):
            return load_and_quantize_model(
                empty(Scripted).eval(),
                tmp_path,
                NF4,
                device_map,
                offload_folder=tmp_path / "offload",
                offload="quantized",
                **options,
            )

        return build

    @pytest.mark.parametrize(
        "device_map",
        [
            {"": RUNS_ON, "scripted": "disk"},
            {"": RUNS_ON, "nested": "disk"},
            {"": RUNS_ON, "nested.1.1.weight": "disk", "blocks.1": "disk"},
            {"": RUNS_ON, "scripted": "disk", "nested": "disk", "blocks": "disk"},
            {"": RUNS_ON, "blocks.0.1": "disk"},
            "auto",
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_they_compute_the_bits_of_the_resident_model(self, load, device_map):
        resident = load(RUNS_ON)
        model = load(device_map, max_memory={"cpu": 25_000} if device_map == "auto" else None)
        offloaded = {name for name, tensor in model.state_dict().items() if is_file_backed(tensor)}
        assert offloaded
        x = torch.randn(5, 32)
        expected = resident(x.to(resident.up.weight.device)).cpu()
        copied = copy.deepcopy(model)
        for each in (model, copied):
            rest = {name: tensor.data_ptr() for name, tensor in each.state_dict().items()}
            for _ in range(4):
                assert torch.equal(each(x), expected)
                assert {name: tensor.data_ptr() for name, tensor in each.state_dict().items()} == rest
        assert offloaded == {name for name, tensor in model.state_dict().items() if is_file_backed(tensor)}
        materialize(model)
        assert not any(map(is_file_backed, model.state_dict().values()))
        assert torch.equal(model(x.to(model.up.weight.device)).cpu(), expected)

    def test_as_a_model_it_cannot_be_dispatched(self):
        model = scripted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        with pytest.raises(PlacementError, match="a ScriptModule cannot carry the hooks of a device_map"):
            dispatch(model, {"0": "cpu", "1": "disk"})

    @torch.no_grad()
    def test_what_was_lent_is_given_back_after_an_exception(self, load):
        model = load({"": RUNS_ON, "scripted": "disk", "nested": "disk"})
        rest = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        seen = []

        def fail(head, args):
            seen.append(is_file_backed(model.scripted.weight))
            raise ValueError("on purpose")

        model.head.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            model(torch.randn(5, 32))
        assert seen == [False], "it was lent"
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == rest

    def test_a_copy_is_lent_its_own_tensors(self, load):
        copied = copy.deepcopy(load({"": RUNS_ON, "nested": "disk"}))
        held = {id(table[name]) for table, name in copied._hf_hook.block._tables}
        assert held == {id(tensor) for name, tensor in copied.named_parameters() if name.startswith("nested.")}

    def test_an_interrupted_commit_puts_their_tensors_back(self, tmp_path, monkeypatch):
        import bigq.loading.jobs

        model, commit = Scripted(), bigq.loading.jobs.commit_tensor
        save_file({k: torch.zeros_like(t) for k, t in model.state_dict().items()}, tmp_path / "model.safetensors")
        before = [(name, id(tensor), tensor.clone()) for name, tensor in named_tensors(model)]
        tables = [(module._parameters, module._buffers) for module in model.modules()]

        def interrupted(modules, planned, *args, **kwargs):
            commit(modules, planned, *args, **kwargs)
            if "head.bias" in planned.names:
                raise KeyboardInterrupt

        monkeypatch.setattr(bigq.loading.jobs, "commit_tensor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_and_quantize_model(model, tmp_path, NF4, "cpu")
        assert [(name, id(tensor)) for name, tensor in named_tensors(model)] == [entry[:2] for entry in before]
        assert all(
            torch.equal(tensor, old) for (_, tensor), (_, _, old) in zip(named_tensors(model), before, strict=True)
        )
        for module, (parameters, buffers) in zip(model.modules(), tables, strict=True):
            assert module._parameters is parameters
            assert module._buffers is buffers
        assert model(torch.randn(2, 32)).isfinite().all()


def named_tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]
