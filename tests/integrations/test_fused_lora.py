"""fuse_lora: a plain adapter on a quantized linear is computed in one node of autograd, and all else in PEFT's way."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from bigq import NF4, Int8, QuantizationConfig, load_and_quantize_model
from bigq.errors import ConfigError
from bigq.system.internals import calls_only_forward, something_transforms

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from adapted import distance, float_twin, logits, moved, quantized, state, tuned  # noqa: E402  # it imports peft
from bigq.integrations import fused_lora  # noqa: E402
from bigq.integrations.fused_lora import FusedLoraLinear, fuse_lora, unfuse_lora  # noqa: E402
from tuners import IDS, llama, lora  # noqa: E402

# Where torch does not tell what listens to a call, all go PEFT's way.
FUSES = not something_transforms() and calls_only_forward(nn.Identity())
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(params=[NF4(), NF4(double_quant=True), Int8()], ids=["nf4", "nf4-double-quant", "int8"])
def weight_format(request):
    return request.param


@pytest.fixture
def fused_calls(monkeypatch):
    """A list that gets an entry for each call that is computed in one node."""
    calls, inner = [], fused_lora.adapted_linear

    def noted(name, *args):
        calls.append(name)
        return inner(name, *args)

    monkeypatch.setattr(fused_lora, "adapted_linear", noted)
    return calls


def layer(dtype=torch.float32, config=None, fmt="nf4", linear=nn.Linear, **settings):
    """A quantized linear [48, 64] with an adapter of random numbers, in a model of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(64, 48) if linear is nn.Linear else linear(48, 64), nn.Identity()).to(dtype)
    model = load_and_quantize_model(model, None, QuantizationConfig(fmt, **settings), "cpu").requires_grad_(False)
    config = config or peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def plain(**settings):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["0"], "init_lora_weights": False, **settings})


X = torch.linspace(-1, 1, 5 * 64).view(5, 64) ** 3


def both(model, x=X, **kwargs):
    """Outputs of PEFT's way and of the fused model, and the gradients of input and trained tensors."""
    found = []
    for change in (unfuse_lora, fuse_lora):
        change(model)
        model.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        torch.manual_seed(3)  # dropout
        out = model(leaf, **kwargs)
        out.float().square().sum().backward()
        found.append([out.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    return found


def test_a_model_of_transformers_has_the_outputs_and_gradients_of_its_float_twin(weight_format, fused_calls):
    model = moved(tuned(quantized(weight_format), lora()), by=0.1)
    twin = float_twin(model, lora(), weight_format).train()
    assert fuse_lora(model) == 8  # q, v, o and down of two layers
    twin(input_ids=IDS, labels=IDS).loss.backward()
    expected, found = dict(twin.named_parameters()), []
    for _ in range(2):  # fused, and in PEFT's way
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        found.append([distance(gradient, expected[name].grad) for name, gradient in trained])
        unfuse_lora(model)
    assert len(fused_calls) == 8 * FUSES
    for ours, theirs in zip(*found, strict=True):
        assert ours < (1.1 * theirs if weight_format.name == "int8" else 1e-5)  # int8 rounds activations


@pytest.mark.parametrize("prepared", [False, True], ids=["bfloat16-activations", "prepared-for-kbit-training"])
def test_under_autocast_a_model_is_as_near_to_float64_as_in_pefts_way(prepared, weight_format, fused_calls):
    base = load_and_quantize_model(llama().to(torch.bfloat16), None, QuantizationConfig(weight_format), "cpu")
    if prepared:
        base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = moved(tuned(base, lora()), by=0.05).train()

    def run(each, **autocast):
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            out = each(input_ids=IDS, labels=IDS)
        out.loss.backward()
        gradients = [p.grad.double().flatten() for p in each.parameters() if p.requires_grad]
        return out.logits.detach().double(), torch.cat(gradients)

    exact = run(float_twin(model, lora(), weight_format).double().train(), enabled=False)
    theirs = [distance(a, b) for a, b in zip(run(model), exact, strict=True)]
    fuse_lora(model)
    ours = [distance(a, b) for a, b in zip(run(model), exact, strict=True)]
    assert len(fused_calls) == (16 if prepared else 8) * FUSES  # checkpointing runs each layer twice
    assert all(our <= 1.25 * their for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, weight_format):
    base = load_and_quantize_model(llama().to(torch.bfloat16), None, QuantizationConfig(weight_format), "cpu")
    found = []
    for checkpointing in (False, True):
        model = moved(tuned(copy.deepcopy(base), lora())).train()
        fuse_lora(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *found))


PLAIN = {
    "scaling": {"lora_alpha": 10},
    "rslora": {"use_rslora": True},
    "dropout-of-0": {"lora_dropout": 0.0},
    "trained-bias": {"bias": "all"},
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_adapters_are_fused(name, weight_format, fused_calls):
    theirs, ours = both(layer(config=plain(**PLAIN[name]), fmt=weight_format).train())
    assert len(fused_calls) == FUSES
    assert len(ours) == (5 if name == "trained-bias" else 4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_conv1d_is_fused(fused_calls):
    conv1d = transformers.pytorch_utils.Conv1D
    theirs, ours = both(layer(config=plain(fan_in_fan_out=True), linear=conv1d))
    assert len(fused_calls) == FUSES
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_and_is_fused_after_it(fused_calls):
    model = layer(config=plain(lora_dropout=0.5))
    assert all(map(torch.equal, *both(model.train())))
    assert not fused_calls
    both(model.eval())
    assert len(fused_calls) == FUSES


def _hooked(model, module, register):
    part = {"base": lambda m: m.base_layer, "down": lambda m: m.lora_A["default"], "up": lambda m: m.lora_B["default"]}
    heard = []
    getattr(part[module](model.base_model.model[0]), register)(lambda *args: heard.append(1))
    return heard


@pytest.mark.parametrize("module", ["base", "down", "up"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_of_what_a_layer_is_made_of_are_heard(module, register, fused_calls):
    model = layer()
    heard = _hooked(model, module, register)
    assert all(map(torch.equal, *both(model)))
    assert len(heard) == 2
    assert not fused_calls


def test_hooks_of_all_modules_are_heard(fused_calls):
    model, heard = layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: heard.append(1))
    try:
        assert all(map(torch.equal, *both(model)))
    finally:
        handle.remove()
    assert heard[: len(heard) // 2] == heard[len(heard) // 2 :]
    assert not fused_calls


def test_hooks_of_the_layer_itself_are_heard_and_it_is_fused(fused_calls):
    model, heard = layer(), []
    model.base_model.model[0].register_forward_hook(lambda *args: heard.append(1))
    both(model)
    assert (len(heard), len(fused_calls)) == (2, FUSES)


def test_a_forward_that_someone_gave_the_linear_is_called(fused_calls):
    model = layer()
    base = model.base_model.model[0].base_layer
    base.forward = lambda x, inner=base.forward: inner(x) + 1
    assert all(map(torch.equal, *both(model)))
    assert not fused_calls


@pytest.mark.parametrize("is_hooked_first", [True, False], ids=["hook-first", "hook-after-it"])
def test_a_layer_with_a_hook_of_accelerates_is_fused_and_unfused(is_hooked_first, fused_calls):
    hooks = pytest.importorskip("accelerate.hooks")
    model = layer()
    if is_hooked_first:
        hooks.add_hook_to_module(model.base_model.model[0], hooks.ModelHook())
    fuse_lora(model)
    if not is_hooked_first:
        hooks.add_hook_to_module(model.base_model.model[0], hooks.ModelHook())
    fused = model(X)
    assert len(fused_calls) == (FUSES and not is_hooked_first)  # the hook holds the forward that it found
    unfuse_lora(model)
    torch.testing.assert_close(model(X), fused, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(X), model.base_model.model[0].base_layer(X))
    assert len(fused_calls) == (FUSES and not is_hooked_first)


OTHERS = {
    "dora": {"use_dora": True},
    "bias-of-the-adapter": {"lora_bias": True},
    "velora": {"velora_config": peft.VeloraConfig()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_variants_go_pefts_way(name, fused_calls):
    assert all(map(torch.equal, *both(layer(config=plain(**OTHERS[name])).train())))
    assert not fused_calls


def test_adapters_are_switched_disabled_merged_and_mixed_as_ever(fused_calls):
    model = layer()
    model.add_adapter("other", plain(r=8))
    outs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        theirs, ours = both(model)
        outs[name] = ours[0]
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outs["default"], outs["other"], atol=1e-2)
    assert len(fused_calls) == 2 * FUSES

    model.base_model.set_adapter(["other"])
    both(model)
    assert len(fused_calls) == 3 * FUSES
    model.base_model.set_adapter(["default", "other"])
    assert all(map(torch.equal, *both(model)))
    with model.disable_adapter():
        assert torch.equal(model(X), model.base_model.model[0].base_layer(X))
    names = ["default", "other", "__base__", "default", "other"]
    mixed = model.base_model.model[0](X, adapter_names=names)
    torch.testing.assert_close(mixed[[0, 3]], outs["default"][[0, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[[1, 4]], outs["other"][[1, 4]], rtol=1e-5, atol=1e-5)
    assert len(fused_calls) == 3 * FUSES

    model.set_adapter("default")
    before = model(X)
    model.merge_adapter()
    assert torch.equal(model(X), model.base_model.model[0].base_layer(X))
    assert len(fused_calls) == 4 * FUSES
    model.unmerge_adapter()
    assert torch.equal(model(X), before)
    assert len(fused_calls) == 5 * FUSES
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    torch.testing.assert_close(model(X), outs["other"], rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged[0]).__name__ == "QuantizedLinear"


@pytest.mark.parametrize(
    "x_dtype, adapter, settings",
    [
        pytest.param(torch.bfloat16, torch.float32, {}, id="input-and-adapter-differ"),
        pytest.param(torch.float32, torch.float32, {"compute_dtype": torch.bfloat16}, id="compute-dtype-differs"),
    ],
)
def test_several_dtypes_go_pefts_way(x_dtype, adapter, settings, fused_calls):
    model = layer(**settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    assert all(map(torch.equal, *both(model, X.to(x_dtype))))
    assert not fused_calls


def test_autocast_does_not_cast_a_float64_adapter(fused_calls):
    model = layer()
    model.base_model.model[0].lora_A.double()
    for way in (unfuse_lora, fuse_lora):
        way(model)
        with pytest.raises(RuntimeError, match="dtype"), torch.autocast("cpu", torch.bfloat16):
            model(X)
    assert not fused_calls


def test_autocast_is_on_again_after_a_call_also_after_one_that_raised(fused_calls):
    model = layer()
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            model(X[:, :60])
        assert torch.is_autocast_enabled("cpu")
        assert (X @ X.T).dtype == torch.bfloat16
    assert len(fused_calls) == 2 * FUSES


def _vmapped(model):
    return torch.func.vmap(model)(X)


def _tangent(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, X.flip(0)))).tangent


def _traced(model):
    with torch.no_grad():
        return torch.jit.trace(model.base_model.model, (X,), check_trace=False)(X)


def _exported(model):
    return torch.export.export(model.base_model.model, (X,)).module()(X)


def _compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)(X)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, where vmap calls an op for each row
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")
@pytest.mark.parametrize("run", [_vmapped, _tangent, _traced, _exported, _compiled])
def test_transforms_and_traces_see_pefts_own_layers(run, fused_calls):
    torch._dynamo.reset()
    model = layer().eval()
    expected = run(model)
    fuse_lora(model)
    torch._dynamo.reset()
    assert torch.equal(run(model), expected)
    assert not fused_calls


def test_a_fake_tensor_goes_through_the_dispatcher(fused_calls):
    model = layer()
    fuse_lora(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(X)).shape == (5, 48)
    assert not fused_calls


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the compiler
def test_a_compiled_block_computes_what_an_eager_one_does(weight_format, fused_calls):
    torch._dynamo.reset()
    model = moved(tuned(quantized(weight_format), lora())).train()
    found = []
    for compiled in (False, True):
        if compiled:
            fuse_lora(model)
            for block in model.base_model.model.model.layers:
                block.compile(backend="aot_eager")
        model.zero_grad()
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        found.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert not fused_calls  # the compiler fuses what it can
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_files_names_and_tensors_stay_pefts(tmp_path, weight_format):
    model = moved(tuned(quantized(weight_format), lora()))
    names, before = [name for name, _ in model.named_parameters()], state(model)
    model.save_pretrained(tmp_path / "before")
    fuse_lora(model)
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path / "fused")
    files = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("before", "fused")]
    assert files[0] == files[1]
    again = peft.PeftModel.from_pretrained(quantized(weight_format), tmp_path / "fused").eval()
    assert fuse_lora(again) == 8
    assert torch.equal(logits(again), logits(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_fused_and_has_tensors_of_its_own(copied, fused_calls):
    model = layer()
    fuse_lora(model)
    expected = model(X)
    twin = copied(model)
    assert torch.equal(twin(X), expected)
    twin.base_model.model[0].lora_B["default"].weight.data.zero_()
    assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)
    assert len(fused_calls) == 4 * FUSES


def test_fusing_twice_and_undoing_twice_is_once():
    model = layer()
    kind = type(model.base_model.model[0])
    assert fuse_lora(model) == fuse_lora(model) == 1
    assert type(model.base_model.model[0]) is FusedLoraLinear
    for _ in range(2):
        unfuse_lora(model)
        assert type(model.base_model.model[0]) is kind is peft.tuners.lora.Linear


def test_a_model_without_such_layers_is_refused():
    floating = peft.get_peft_model(nn.Sequential(nn.Linear(64, 48)), plain())
    for model in (floating, quantized(NF4())):
        with pytest.raises(ConfigError, match="no LoRA layer over a quantized linear"):
            fuse_lora(model)


def test_a_block_on_the_disk_gives_what_a_resident_one_does(weight_format, tmp_path, fused_calls):
    load = partial(load_and_quantize_model, offload="quantized", offload_folder=tmp_path / "offload")
    offloaded = load(llama(), None, QuantizationConfig(weight_format), {"": "cpu", "model.layers.1": "disk"})
    models = [tuned(each, lora()) for each in (offloaded, quantized(weight_format))]
    peft.set_peft_model_state_dict(models[1], peft.get_peft_model_state_dict(moved(models[0])))
    found = []
    for model in models:
        fuse_lora(model)
        out = model.train()(input_ids=IDS, labels=IDS)
        out.loss.backward()
        found.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(fused_calls) == 2 * 8 * FUSES
    assert all(map(torch.equal, *found))


def _trained(fused, weight_format, folder, **settings):
    torch.manual_seed(0)
    base = load_and_quantize_model(llama().to(torch.bfloat16), None, QuantizationConfig(weight_format), "cpu")
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = tuned(base, lora())
    if fused:
        fuse_lora(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[],
        per_device_train_batch_size=2, disable_tqdm=True, use_cpu=True, bf16=True, **settings,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows * 8)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_the_trainer_of_transformers_learns_the_same(optimizer, weight_format, tmp_path, fused_calls):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    train = partial(_trained, weight_format=weight_format, folder=tmp_path, optim=optimizer)
    expected, losses = train(False), train(True)
    assert len(fused_calls) == 6 * 16 * FUSES
    assert losses[-1] < 0.9 * losses[0]
    assert all(abs(loss / one - 1) < 0.02 for loss, one in zip(losses, expected, strict=True))


def test_gradient_scaling_of_float16_sees_what_overflows(fused_calls):
    model = layer(torch.float16).train()
    fuse_lora(model)
    with torch.autocast("cpu", torch.float16):
        out = model(X.half())
    (out.float().sum() * 1e7).backward()
    assert not model.base_model.model[0].lora_A["default"].weight.grad.isfinite().all()
    assert len(fused_calls) == FUSES


def test_autocast_caches_nothing_without_a_gradient():
    """A factor that torch's cache had cast without a gradient would train no more in this context."""
    model = layer(torch.bfloat16).train()
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(X.bfloat16())
        with nullcontext(unfuse_lora(model)):
            model(X.bfloat16()).float().sum().backward()
    assert model.base_model.model[0].lora_A["default"].weight.grad.abs().sum() > 0
