"""sample_products and evaluating: gradients by the model's own labels, refusals in words, a model that is restored."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigq
from bigq.calibration.batches import as_batches
from bigq.calibration.sampled_passes import evaluating, sample_products
from bigq.calibration.watched_products import Use, WatchedWeight

V = 5


class Logits(nn.Module):
    """An embedding and one linear, whose logits are what `returns` makes of them."""

    def __init__(self, returns=lambda logits: logits):
        super().__init__()
        self.embed, self.head, self.returns = nn.Embedding(V, 4), nn.Linear(4, V, bias=False), returns

    def forward(self, ids, attention_mask=None, targets=None):
        return self.returns(self.head(self.embed(ids)))


def sampled(model, batches, *, size=10_000, gradients=True, **settings):
    weights = [WatchedWeight("head.weight", model.head.weight, False)]
    with evaluating(model):
        return sample_products(
            model, weights, as_batches(model, batches), size=size, seed=0, gradients=gradients, **settings
        )


def test_gradients_are_those_of_labels_from_the_models_own_distribution():
    """The gradient of log p(y) by the logits is onehot(y) - p, whose mean over y is zero and covariance is known."""
    model, ids = Logits(), torch.full((1, 4000), 3)
    found = sampled(model, [ids])
    gradients = found.tokens[Use("head.weight", "outputs")].gradients
    p = model(ids[:, 0]).softmax(-1).squeeze(0).detach()
    labels = (gradients + p).round()
    assert torch.allclose(gradients + p, labels, atol=1e-6)
    assert torch.equal(labels.sum(1), torch.ones(4000))
    assert found.predictions == 4000
    frequency = labels.mean(0)
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt()).all()


RETURNS = {
    "tensor": (lambda logits: logits, {}),
    "tuple of minGPT": (lambda logits: (logits, None), {}),
    "object": (lambda logits: types.SimpleNamespace(logits=logits, loss=None), {}),
    "dict": (lambda logits: {"hidden": logits.sum(), "logits": logits}, {}),
    "function": (lambda logits: {"y": [logits]}, {"logits": lambda out: out["y"][0]}),
}


@pytest.mark.parametrize("name", RETURNS)
def test_logits_are_found(name):
    returns, settings = RETURNS[name]
    found = sampled(Logits(returns), [torch.tensor([[1, 2, 3]])], **settings)
    assert found.predictions == 3
    assert found.tokens[Use("head.weight", "outputs")].gradients.abs().sum() > 0


REFUSED = {
    "no logits": (lambda logits: {"last": logits.sum(), "first": 1}, r"returned no logits, but \['first', 'last'\]"),
    "one class": (lambda logits: logits[..., :1], r"logits are \[1, 3, 1\], of one class"),
    "detached": (lambda logits: logits.detach(), "the logits have no gradient"),
    "written to": (
        lambda logits: logits.exp().mul_(2),  # exp needs its result again
        "the backward pass of the model failed .*modified by an inplace",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradients_is_refused(name):
    returns, message = REFUSED[name]
    with pytest.raises(bigq.UnsupportedError, match=message) as caught:
        sampled(Logits(returns), [torch.tensor([[1, 2, 3]])])
    assert "sensitivity='output'" in str(caught.value)


def test_nan_in_the_logits_is_refused():
    with pytest.raises(bigq.ConfigError, match="the logits hold NaN or Inf"):
        sampled(Logits(lambda logits: logits * float("nan")), [torch.tensor([[1]])])


def test_memory_that_runs_out_is_an_error_in_words():
    def too_much(logits):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    with pytest.raises(bigq.UnsupportedError, match=r"took more memory than there is .*pass smaller batches"):
        sampled(Logits(too_much), [torch.tensor([[1]])])


def test_a_weight_under_no_grad_is_named():
    class Frozen(Logits):
        def forward(self, ids):
            with torch.no_grad():
                hidden = F.linear(self.embed(ids), self.head.weight)
            return hidden.requires_grad_() * 1

    with pytest.raises(bigq.UnsupportedError, match=r"1 weights multiply where .*torch.no_grad.*head\.weight"):
        sampled(Frozen(), [torch.tensor([[1]])])


def test_a_weight_that_multiplies_nothing_is_named():
    class Unused(Logits):
        def forward(self, ids):
            return torch.einsum("btk,nk->btn", self.embed(ids), self.head.weight)

    with pytest.raises(bigq.ConfigError, match=r"multiplied nothing by 1 of its weights.*head\.weight.*rules="):
        sampled(Unused(), [torch.tensor([[1]])], gradients=False)


def test_padding_predicts_nothing():
    ids, mask = torch.tensor([[1, 2, 3], [1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = sampled(Logits(), [{"ids": ids, "attention_mask": mask}])
    tokens = found.tokens[Use("head.weight", "outputs")]
    assert found.predictions == 4
    assert len(tokens.inputs) == 4
    assert (tokens.gradients.abs().sum(1) > 0).all()
    with pytest.raises(bigq.ConfigError, match="predicts nothing on these batches: by their attention_mask"):
        sampled(Logits(), [{"ids": ids, "attention_mask": 0 * mask}])


def test_gradient_mode_outside_does_not_matter():
    expected = sampled(model := Logits(), [torch.tensor([[1, 2, 3]])]).tokens[Use("head.weight", "outputs")]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = sampled(model, [torch.tensor([[1, 2, 3]])]).tokens[Use("head.weight", "outputs")]
        assert torch.equal(found.gradients, expected.gradients)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_is_as_before(fails):
    class Picky(Logits):
        def forward(self, ids):
            assert not self.training
            if fails:
                raise KeyError("no such id")
            return super().forward(ids)

    model = Picky().train()
    model.embed.eval()
    model.embed.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[1, 2]])
    hidden = torch.randn(1, 2, 4, requires_grad=True)
    if fails:
        with pytest.raises(KeyError, match="no such id"):
            sampled(model, [ids])
    else:
        sampled(model, [ids])
    assert (model.training, model.embed.training, model.head.training) == (True, False, True)
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.head._forward_hooks
    assert not model.head._forward_pre_hooks
    assert hidden.grad is None
    assert torch.is_grad_enabled()
    assert not F.linear(torch.ones(1, 4), model.head.weight.detach()).requires_grad, "no product is hooked any more"


def test_an_input_that_requires_a_gradient_gets_none():
    class Embedded(Logits):
        def forward(self, hidden):
            return self.head(hidden)

    hidden = torch.randn(1, 3, 4, requires_grad=True)
    sampled(Embedded(), [hidden])
    assert hidden.grad is None


def test_a_compiled_module_runs_eagerly():
    model = Logits()
    model.head = torch.compile(model.head, backend="eager")
    weights = [WatchedWeight("head.weight", model.head._orig_mod.weight, False)]
    with evaluating(model):
        found = sample_products(
            model, weights, as_batches(model, [torch.tensor([[1, 2]])]), size=10, seed=0, gradients=True
        )
    assert found.tokens[Use("head.weight", "outputs")].gradients.shape == (2, V)
