"""limits: the memory of devices, by the names that plans have for them."""

from collections.abc import Mapping

from accelerate.utils import convert_file_size_to_int

__all__ = ["as_limits", "as_max_memory"]


def as_limits(max_memory: Mapping[int | str, int | str]) -> dict[str, int]:
    """{"cuda:0", "cpu" or "disk": bytes} of {GPU index, "cpu" or "disk": bytes, or a string such as "12GiB"}."""
    return {
        place if isinstance(place, str) else f"cuda:{place}": convert_file_size_to_int(nbytes)
        for place, nbytes in max_memory.items()
    }


def as_max_memory(limits: Mapping[str, int]) -> dict[int | str, int]:
    """The `max_memory` of a load that says the same as `limits`."""
    return {
        int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device: nbytes
        for device, nbytes in limits.items()
    }
