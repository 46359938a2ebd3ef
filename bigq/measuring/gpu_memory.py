"""peak_nbytes: the most memory that tensors took on a GPU."""

import torch

__all__ = ["peak_nbytes", "reset_peak"]


def reset_peak(device: torch.device) -> None:
    """Count the peak from now on. On a CPU there is no count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_nbytes(device: torch.device) -> int | None:
    """Bytes that tensors took at once on a GPU since `reset_peak`; None on a CPU, where torch does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
