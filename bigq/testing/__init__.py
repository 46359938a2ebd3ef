"""Testing: whether a format keeps its contract, whether a product is accurate, and bytes that cannot be read."""

from bigq.testing.budget import assert_within_budget
from bigq.testing.faulty_bytes import FaultyBytes, with_bytes
from bigq.testing.format_contract import check_format

__all__ = ["FaultyBytes", "assert_within_budget", "check_format", "with_bytes"]
