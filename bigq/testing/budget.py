"""assert_within_budget: whether a product is as accurate as the same product in torch allows."""

import torch
from torch import Tensor

__all__ = ["assert_within_budget"]


def assert_within_budget(out: Tensor, exact: Tensor, baseline: Tensor, *, also: float = 0.0) -> None:
    """Raise an AssertionError if `out` has more than twice the error of `baseline`, and one rounding.

    Errors are those of the whole tensor, in the Frobenius norm: the largest error of a single element is mostly luck.

    Args:
        out: the product to check, of any shape.
        exact: the product in float64, of the same shape.
        baseline: the same product as torch computes it, with the dtype that `out` has.
        also: an error that is allowed in addition, relative to the norm of `exact`, such as that of rounding the
            activations.

    Raises:
        AssertionError: the shape or the dtype of `out` is not that of `baseline`, or the error is too large.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(16, 512), torch.randn(64, 512)
        >>> exact = x.double() @ weight.double().T
        >>> assert_within_budget((x @ weight.T).half(), exact, baseline=x.half() @ weight.half().T)
    """
    for kind in ("shape", "dtype"):
        got, expected = getattr(out, kind), getattr(baseline, kind)
        assert got == expected, f"the {kind} of the product is {got}; expected {expected}"
    norm = exact.norm()
    error, allowed = ((product.double() - exact).norm() for product in (out, baseline))
    budget = 2 * allowed + norm * (torch.finfo(out.dtype).eps / 2 + also)
    assert error <= budget, f"the relative error is {error / norm:.1e}, and {budget / norm:.1e} is allowed"
