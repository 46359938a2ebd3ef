"""The transforms of torch.func: a quantized linear has the derivatives of the weight that it stands for."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from bigq import FP4, NF4, Int8, QuantizationConfig, UnsupportedError, load_and_quantize_model, materialize
from bigq.system.internals import TELLS_LISTENERS
from dequantized import dequantized

pytestmark = [
    pytest.mark.skipif(not TELLS_LISTENERS, reason="torch does not tell that a transform is active"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # torch's, where vmap calls an op for each row
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # torch's, in linearize
]

torch.manual_seed(0)
X, DX = torch.randn(3, 24), torch.randn(3, 24)


class Square(nn.Module):
    def forward(self, x):
        return x.square() / 8


def build():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 16), Square(), nn.Linear(16, 16, bias=False), Square(), nn.Linear(16, 2))


def loss(model):
    return lambda x: model(x).pow(2).sum()


def bias_loss(model):
    return lambda bias, x: functional_call(model, {"0.bias": bias}, (x,)).pow(2).sum()


TRANSFORMS = {
    "vmap": lambda model: vmap(model)(X),
    "vmap of vmap": lambda model: vmap(vmap(model))(X[None]),
    "grad": lambda model: grad(loss(model))(X),
    "grad of vmap": lambda model: grad(lambda x: vmap(model)(x).pow(2).sum())(X),
    "vmap of grad": lambda model: vmap(grad(loss(model)))(X),
    "gradients of a bias for each sample": lambda model: vmap(grad(bias_loss(model)), (None, 0))(model[0].bias.data, X),
    "jacrev": lambda model: jacrev(model)(X[0]),
    "jacfwd": lambda model: jacfwd(model)(X[0]),
    "vjp": lambda model: vjp(model, X)[1](torch.ones(3, 2))[0],
    "linearize": lambda model: linearize(model, X)[1](DX),
    "hessian": lambda model: hessian(loss(model))(X[0]),
    "jacrev of jacrev": lambda model: jacrev(jacrev(loss(model)))(X[0]),
    "jacfwd of jacfwd": lambda model: jacfwd(jacfwd(loss(model)))(X[0]),
    "jacrev of jacfwd": lambda model: jacrev(jacfwd(loss(model)))(X[0]),
    "hessian times a vector": lambda model: jvp(grad(loss(model)), (X,), (DX,))[1],
    "jacfwd of the gradient of a bias": lambda model: jacfwd(grad(bias_loss(model)))(model[0].bias.data, X),
    "third": lambda model: jvp(lambda u: jvp(grad(loss(model)), (u,), (DX,))[1], (X,), (DX,))[1],
    "autograd, forward": lambda model: torch.autograd.functional.jacobian(
        model, X, vectorize=True, strategy="forward-mode"
    ),
}
FORMATS = [NF4(block_size=32), FP4(double_quant=True), Int8(threshold=1e-30)]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("without_grad", [False, True], ids=["grad", "no_grad"])
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_a_transform_gives_the_numbers_of_the_dequantized_weight(weight_format, without_grad, transform):
    """With this threshold int8 rounds no activations. If it did, other points would have the derivatives."""
    model = load_and_quantize_model(build(), None, QuantizationConfig(weight_format), "cpu")
    plain = dequantized(model, build())
    with torch.set_grad_enabled(not without_grad):
        got, expected = transform(model), transform(plain)
    assert expected.norm() > 0
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("order", [1, 2])
def test_rounded_activations_have_the_derivative_of_the_product(order):
    model = load_and_quantize_model(nn.Sequential(nn.Linear(24, 16)), None, QuantizationConfig("int8"), "cpu")
    weight, bias = model[0].dequantize(), model[0].bias
    if order == 1:
        torch.testing.assert_close(jacrev(model)(X[0]), weight)
        out, change = jvp(model, (X,), (DX,))
        torch.testing.assert_close(out, model(X), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(change, DX @ weight.T)
        assert not torch.allclose(out, X @ weight.T + bias, rtol=1e-5, atol=1e-5), "it rounds"
    else:
        for second in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))):
            torch.testing.assert_close(second(loss(model))(X[0]), 2 * weight.T @ weight)


@pytest.mark.parametrize("derive", [lambda model: grad(loss(model))(X), lambda model: jvp(model, (X,), (DX,))[1]])
def test_derivatives_of_offloaded_blocks_are_refused_and_all_else_works(derive, tmp_path):
    torch.save(build().state_dict(), tmp_path / "checkpoint.pt")
    config = QuantizationConfig("nf4", offload="quantized")
    model = load_and_quantize_model(build(), tmp_path / "checkpoint.pt", config, {"": "disk"})
    plain = dequantized(model, build())
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"call bigq.materialize\(model\)"):
            derive(model)
        torch.testing.assert_close(vmap(model)(X), plain(X))
        torch.testing.assert_close(model(X), plain(X))
    torch.testing.assert_close(derive(materialize(model)), derive(plain))
