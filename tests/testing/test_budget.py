"""assert_within_budget: twice the error of torch, and no more."""

import pytest
import torch

from bigq.testing import assert_within_budget


def test_the_budget_is_twice_the_error_of_the_baseline_and_one_rounding():
    exact = torch.ones(100, dtype=torch.float64)
    baseline = torch.full((100,), 1.01)
    assert_within_budget(torch.full((100,), 1.0199), exact, baseline)
    with pytest.raises(AssertionError, match=r"the relative error is 2.1e-02, and 2.0e-02 is allowed"):
        assert_within_budget(torch.full((100,), 1.021), exact, baseline)
    assert_within_budget(torch.full((100,), 1.021), exact, baseline, also=0.002)
    rounded = torch.full((100,), 1 + 2.0**-11, dtype=torch.float64)
    assert_within_budget(torch.ones(100, dtype=torch.float16), rounded, torch.ones(100, dtype=torch.float16))


def test_another_shape_or_dtype_is_an_error():
    exact = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"the shape of the product is torch.Size\(\[1, 4\]\)"):
        assert_within_budget(torch.ones(1, 4), exact, torch.ones(4))
    with pytest.raises(AssertionError, match=r"the dtype of the product is torch.float16; expected torch.float32"):
        assert_within_budget(torch.ones(4).half(), exact, torch.ones(4))
