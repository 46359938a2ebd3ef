"""Nothing of a trainer outlives its test."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _fresh_accelerator_state():
    """A trainer with bf16 would leave it to every later Accelerator of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
