"""TokenSample: a fair sample of bounded size, with the gradients of its own tokens."""

import pytest
import torch

from bigq.calibration.token_sample import TokenSample


def sample(size, stack=1, seed=0):
    return TokenSample(size, torch.Generator().manual_seed(seed), stack)


def test_tokens_keep_their_own_gradients_over_calls_and_compaction():
    found = sample(8)
    for call in range(5):
        inputs = torch.arange(20.0).unsqueeze(1) + 100 * call
        add = found.take(inputs, 2)
        if add is not None:
            add(torch.cat([-inputs, inputs * 2], 1))
        found.compact()
    tokens = found.tokens(with_gradients=True)
    assert tokens.inputs.shape == (8, 1)
    assert torch.equal(tokens.gradients, torch.cat([-tokens.inputs, tokens.inputs * 2], 1))
    assert len(tokens.inputs.unique()) == 8
    assert tokens.seen.tolist() == [100]


def test_every_token_is_as_likely_whichever_call_it_came_in():
    counts = torch.zeros(40)
    for seed in range(400):
        found = sample(10, seed=seed)
        for start, end in ((0, 3), (3, 25), (25, 40)):
            found.take(torch.arange(start, end).float().unsqueeze(1), 1)
            found.compact()
        tokens = found.tokens(with_gradients=False).inputs.squeeze(1).long()
        counts[tokens] += 1
    # 100 of each on average, with a standard deviation of 8.7; the largest of 40 stays within 4 of these
    assert counts.sum() == 4000
    assert (counts - 100).abs().max() < 35


def test_a_sample_that_is_not_full_holds_every_token():
    found = sample(50)
    found.take(torch.arange(20.0).unsqueeze(1), 1)
    found.take(torch.arange(20.0, 30.0).unsqueeze(1), 1)
    inputs = found.tokens(with_gradients=False).inputs.squeeze(1)
    assert torch.equal(inputs, torch.arange(30.0))


def test_padding_is_left_out_and_members_are_counted():
    found = sample(50, stack=3)
    found.take(
        torch.arange(6.0).unsqueeze(1), 1, rows=torch.tensor([1, 2, 5]), members=torch.tensor([0, 0, 2, 1, 1, 2])
    )
    tokens = found.tokens(with_gradients=False)
    assert tokens.inputs.squeeze(1).tolist() == [1, 2, 5]
    assert tokens.seen.tolist() == [1, 0, 2]
    assert tokens.of(2)[0].squeeze(1).tolist() == [2, 5]


@pytest.mark.parametrize("width", [1, 3])
def test_outputs_without_a_backward_pass_have_zeros(width):
    found = sample(4)
    found.take(torch.ones(2, 5), width)
    assert torch.equal(found.tokens(with_gradients=True).gradients, torch.zeros(2, width))


def test_gradients_of_two_backward_passes_add_up():
    found = sample(4)
    add = found.take(torch.ones(2, 5), 1)
    add(torch.tensor([[1.0], [2.0]]))
    add(torch.tensor([[10.0], [20.0]]))
    assert found.tokens(with_gradients=True).gradients.tolist() == [[11], [22]]
