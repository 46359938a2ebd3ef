"""What compressed-tensors stores for an int8 weight with a scale for each row ("int-quantized")."""

from torch import Tensor

from bigq.formats.base import State
from bigq.formats.int8 import Int8
from bigq.formats.quant_state import Description
from bigq.ops.checks import as_floats

__all__ = ["compressed_tensors", "unsupported_by_compressed_tensors"]


def unsupported_by_compressed_tensors(description: Description) -> str | None:
    """Why compressed-tensors cannot store a weight; None if it can."""
    if not isinstance(description.format, Int8):
        return f"it has no format {description.format.name!r}; expected 'int8'"
    return None if len(description.shape) == 2 else f"int8 of {len(description.shape)} dimensions; expected a matrix"


def compressed_tensors(name: str, state: State) -> dict[str, Tensor]:
    """The tensors of the int8 weight `name`: its codes, and what a code of 1 stands for in each row, [N, 1] float32."""
    return {name: state["packed"], f"{name}_scale": as_floats(state["absmax"]) / 127}
