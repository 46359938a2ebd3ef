"""Each warning of bigq names the line of the user's that led to it, through whichever library the call went."""

import ast
from inspect import currentframe
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bigq
from bigq import NF4, QuantizationConfig, load_and_quantize_model

ROOT = Path(bigq.__file__).parent


class Experts(nn.Module):
    """Weights that bigq does not know."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x):
        return x @ self.stack[0]


class Reading(nn.Linear):
    """Needs the numbers of what it loads."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        assert float(state_dict[f"{prefix}weight"].sum()) != 0
        super()._load_from_state_dict(state_dict, prefix, *args)


def _line():
    """The line that the caller is at, plus one."""
    return currentframe().f_back.f_lineno + 1


def _load(tmp_path):
    model = nn.Sequential(Experts(), nn.Linear(64, 64))
    at = _line()
    load_and_quantize_model(model, None, QuantizationConfig("nf4", skip_defaults=False), device_map="cpu")
    return at


def _load_names(tmp_path):
    save_file(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).state_dict(), tmp_path / "model.safetensors")
    model = nn.Sequential(Reading(64, 64), nn.Linear(64, 64)).to("meta")
    at = _line()
    load_and_quantize_model(model, tmp_path, NF4(), "cpu")
    return at


def _model_of_transformers():
    transformers = pytest.importorskip("transformers")
    import bigq.integrations.transformers  # noqa: F401

    class Config(transformers.PreTrainedConfig):
        model_type = "of_the_tests"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.experts, self.linear = Experts(), nn.Linear(64, 64)
            self.post_init()

        def _init_weights(self, module):
            pass

    return Model, Config


def _from_pretrained(tmp_path):
    kind, config = _model_of_transformers()
    kind(config()).save_pretrained(tmp_path)
    settings = QuantizationConfig("nf4", skip_defaults=False)
    at = _line()
    kind.from_pretrained(tmp_path, quantization_config=settings)
    return at


def _adapted(**settings):
    peft = pytest.importorskip("peft")
    config = QuantizationConfig("nf4", skip_defaults=False)
    model = load_and_quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), None, config, "cpu")
    return model, peft, peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **settings)


def _target_parameters(tmp_path):
    model, peft, config = _adapted(target_parameters=["1.weight"])
    at = _line()
    peft.get_peft_model(model, config)
    return at


def _unmerge(tmp_path):
    model, peft, config = _adapted()
    adapted = peft.get_peft_model(model, config)
    adapted.merge_adapter()
    with torch.no_grad():
        model[0].base_layer.weight.mul_(2)
    at = _line()
    adapted.unmerge_adapter()
    return at


CALLS = {
    "load_and_quantize_model": (_load, "stay as they are"),
    "load of a module that needs numbers": (_load_names, "does not load tensors on meta"),
    "from_pretrained": (_from_pretrained, "stay as they are"),
    "get_peft_model": (_target_parameters, "PEFT cannot adapt"),
    "unmerge_adapter": (_unmerge, "has changed since an adapter was merged"),
}


@pytest.mark.filterwarnings("ignore:target_parameters=.* were set but no parameter was matched")  # PEFT's
@pytest.mark.parametrize("call", CALLS)
def test_a_warning_names_the_line_of_the_user(call, tmp_path):
    function, said = CALLS[call]
    with pytest.warns(UserWarning, match=said) as warned:
        at = function(tmp_path)
    (found,) = [each for each in warned if said in str(each.message)]
    assert (found.filename, found.lineno) == (__file__, at)


def test_all_warnings_of_bigq_are_made_so():
    direct = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "warnings.warn"
    ]
    assert len(direct) == 1
    assert direct[0].startswith("system/user_warnings.py")
