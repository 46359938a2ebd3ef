"""FSDP2 over quantized modules: two processes compute the bits of one, also under a policy that casts parameters."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigq import FP4, NF4, Int8, QuantizationConfig, QuantizedModule, load_and_quantize_model, save_quantized
from bigq.errors import UnsupportedError
from bigq.model.placeholders import hold_placeholders
from bigq.weight.placeholder import is_placeholder
from ranks import error_of, mesh_of, own_device, run_ranks

FORMATS = {
    "nf4": NF4(),
    "nf4-double-quant": NF4(double_quant=True),
    "fp4": FP4(block_size=32),
    "int8": Int8(),
}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.adapter = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y))) + self.adapter(y)


def _model(weight_format):
    """Blocks quantized from float32, whose scales are no bfloat16 numbers, and trained through an adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(*(_Block() for _ in range(2)), nn.Linear(64, 10))
    config = QuantizationConfig(weight_format, skip_modules=["adapter"])
    model = load_and_quantize_model(model, None, config, own_device())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name)
    return model


def _compare(rank, folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = mesh_of(2)
    found = {}
    x = torch.linspace(-2, 2, 3 * 64).view(3, 64).to(own_device())
    for name, weight_format in FORMATS.items():
        for dtype in (None, torch.bfloat16):
            one = _model(weight_format).to(dtype or torch.float32)
            expected = one(x.to(dtype or torch.float32))
            expected.square().mean().backward()
            sharded = _model(weight_format)
            state = {key: tensor.clone() for key, tensor in sharded.state_dict().items()}
            policy = MixedPrecisionPolicy(param_dtype=dtype)
            for block in sharded[:2]:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(sharded, mesh=mesh, mp_policy=policy)
            out = sharded(x)
            out.square().mean().backward()
            gradient = sharded[0].adapter.weight.grad.full_tensor()
            kept = all(
                torch.equal(tensor.full_tensor(), state[key])
                for key, tensor in sharded.state_dict().items()
                if not tensor.is_floating_point()
            )
            exact = one[0].adapter.weight.grad.float()
            found[f"{name}-{dtype}"] = (
                torch.equal(out, expected),
                kept,
                ((gradient.float() - exact).norm() / exact.norm()).item(),
            )
    found["state"] = _keeps_its_state(rank, mesh)
    found["refused"] = _refused(mesh, folder)
    found["ignored"] = {name: _without_descriptions(own, mesh, x) for name, own in FORMATS.items()}
    found["one copy each"] = {name: _copies(own, x) for name, own in FORMATS.items()}
    found["fsdp1"] = _fsdp1()
    return found


def _without_descriptions(own, mesh, x):
    """Whether a model whose quant_state stays whole, which saves a tensor in each gather, computes the same."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    one, model = _model(own), _model(own)
    ignored = {parameter for name, parameter in model.named_parameters() if name.endswith("quant_state")}
    for block in (*model[:2], model):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "to_local")]
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    expected = one.state_dict() if torch.distributed.get_rank() == 0 else {}
    same = state.keys() == expected.keys() and all(torch.equal(state[key], expected[key].cpu()) for key in expected)
    return torch.equal(model(x), one(x)), whole, same


def _copies(own, x):
    """Whether DDP, which holds a copy on each process, computes the outputs and gradients of one process."""
    from torch.nn.parallel import DistributedDataParallel

    one, model = _model(own), _model(own)
    copies = DistributedDataParallel(model)
    out, expected = copies(x), one(x)
    for loss in (out, expected):
        loss.square().mean().backward()
    return torch.equal(out, expected) and torch.equal(model[0].adapter.weight.grad, one[0].adapter.weight.grad)


def _fsdp1():
    """What FSDP1 raises: of a whole model, of each block by a policy, and where what is quantized is left out."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    blocks, apart, device = ModuleWrapPolicy({_Block}), [_model(NF4()) for _ in range(2)], own_device()
    left_out = [[module for module in model.modules() if isinstance(module, QuantizedModule)] for model in apart]
    left_out[1] = [own for module in left_out[1] for own in module.parameters()]
    cases = [(_model(NF4()), {}), (_model(Int8()), {"auto_wrap_policy": blocks})]
    cases += [(model, {"ignored_states": states}) for model, states in zip(apart, left_out, strict=True)]
    return [
        error_of(partial(FullyShardedDataParallel, model, device_id=device, use_orig_params=True, **settings))
        for model, settings in cases
    ]


def _hybrid(rank, folder):
    """HSDP: two copies of the model, each in two shards. [(equal outputs, worst gradient), ...]."""
    from torch.distributed.fsdp import fully_shard

    mesh, found = mesh_of(2, 2, mesh_dim_names=("replicate", "shard")), {}
    x = torch.linspace(-2, 2, 3 * 64).view(3, 64).to(own_device())
    for name, own in FORMATS.items():
        one, model = _model(own), _model(own)
        for block in (*model[:2], model):
            fully_shard(block, mesh=mesh)
        out, expected = model(x), one(x)
        for loss in (out, expected):
            loss.square().mean().backward()
        exact = one[0].adapter.weight.grad
        error = (model[0].adapter.weight.grad.full_tensor() - exact).norm() / exact.norm()
        dense, whole = model[0].up.dequantize().full_tensor(), one[0].up.dequantize()
        save_quantized(model, f"{folder}/hybrid-{name}")
        skeleton = nn.Sequential(*(_Block() for _ in range(2)), nn.Linear(64, 10)).to("meta")
        loaded = load_and_quantize_model(skeleton, f"{folder}/hybrid-{name}", None, own_device())
        same = all(torch.equal(tensor, one.state_dict()[key]) for key, tensor in loaded.state_dict().items())
        found[name] = torch.equal(out, expected), torch.equal(dense, whole), same, error.item()
    return found


def _refused(mesh, folder):
    """What a load into a sharded skeleton, and of a sharded model's own weights, says."""
    from torch.distributed.fsdp import fully_shard

    said = []
    for device, weights in (("meta", ""), (own_device(), None)):
        with torch.device(device):
            model = nn.Sequential(_Block(), nn.Linear(64, 10))
        fully_shard(model, mesh=mesh)
        if weights is not None:
            weights = f"{folder}/{torch.distributed.get_rank()}.safetensors"
            save_file({name: torch.zeros(p.shape) for name, p in model.named_parameters()}, weights)
        try:
            load_and_quantize_model(model, weights, QuantizationConfig("nf4"), own_device())
        except UnsupportedError as error:
            said.append(str(error))
    return said


def _keeps_its_state(rank, mesh):
    """Whether torch and accelerate gather and distribute the state of a model that has placeholders."""
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    models = [_model(NF4()) for _ in range(2)]
    for model in models:
        hold_placeholders(model)
    state = models[0].state_dict()
    models[1] = models[1].to("meta")
    for model in models:
        for block in model[:2]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    gathered = get_model_state_dict(models[0], options=options)
    kept = rank > 0 or all(torch.equal(tensor, state[key].cpu()) for key, tensor in gathered.items())
    set_model_state_dict(models[0], gathered, options=options)
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=rank == 0), models[1], state)
    for model in models:
        held = {key: tensor.full_tensor() for key, tensor in model.state_dict().items()}
        kept &= held.keys() == {key for key in state if not is_placeholder(state[key])}
        kept &= all(torch.equal(tensor, state[key]) for key, tensor in held.items())
    return kept


@pytest.fixture(scope="module")
def compared(tmp_path_factory, nccl):
    folder = tmp_path_factory.mktemp("fsdp2")
    return run_ranks(_compare, folder, str(folder), gpus=nccl)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["no-policy", "bfloat16-policy"])
@pytest.mark.parametrize("name", FORMATS)
def test_two_processes_compute_the_bits_of_one(compared, name, dtype):
    for found in compared:
        same_outputs, same_state, gradient_error = found[f"{name}-{dtype}"]
        assert same_outputs
        assert same_state
        assert gradient_error < (1e-2 if dtype else 1e-5)  # the reduction sums in another order


def test_a_load_into_a_sharded_model_is_refused(compared):
    for found in compared:
        assert len(found["refused"]) == 2
        for said in found["refused"]:
            assert said.startswith("8 tensors of the model are sharded (DTensor)")
            assert "0.norm.weight" in said


def test_a_state_with_placeholders_is_gathered_and_distributed(compared):
    assert [found["state"] for found in compared] == [True, True]


@pytest.mark.parametrize("name", FORMATS)
def test_descriptions_may_stay_whole(compared, name):
    for found in compared:
        same_outputs, whole, same_state = found["ignored"][name]
        assert same_outputs
        assert same_state
        assert whole == [f"{block}.{leaf}.quant_state" for block in (0, 1) for leaf in ("up", "down")]


@pytest.mark.parametrize("name", FORMATS)
def test_ddp_computes_the_bits_of_one_process(compared, name):
    assert [found["one copy each"][name] for found in compared] == [True, True]


def test_fsdp1_is_refused_with_the_remedy(compared):
    for found in compared:
        whole, blocks, *left_out = found["fsdp1"]
        for said in (whole, blocks):
            assert said.startswith("UnsupportedError: FSDP1 (FullyShardedDataParallel) puts all parameters")
            assert "set fsdp_version: 2 in fsdp_config" in said
        assert left_out == ["", ""]  # modules, and parameters: each process holds the quantized weights whole then


@pytest.mark.slow  # 27 s of CPU time: four processes
def test_two_copies_in_two_shards_each_compute_and_save_what_one_process_does(tmp_path):
    for found in run_ranks(_hybrid, tmp_path, str(tmp_path), world=4):
        for same_outputs, same_weight, same_files, gradient_error in found.values():
            assert same_outputs
            assert same_weight
            assert same_files
            assert gradient_error < 1e-5
