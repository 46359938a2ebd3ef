"""Models that bitsandbytes has converted: refused, because their weights are its own or become so."""

from bigq.errors import UnsupportedError
from bigq.model.tree import ModelTree
from bigq.system.text import shortlist

__all__ = ["refuse_bitsandbytes"]

_QUANTIZED = {"Linear4bit", "Linear8bitLt", "Embedding4bit", "Embedding8bit"}


def refuse_bitsandbytes(tree: ModelTree) -> None:
    """Raise an UnsupportedError if the model holds quantized layers of bitsandbytes, which is not imported for it."""
    found = [
        f"{type(module).__name__} {name!r}"
        for name, module in tree.modules.items()
        if type(module).__module__.partition(".")[0] == "bitsandbytes"
        and any(kind.__name__ in _QUANTIZED for kind in type(module).__mro__)
    ]
    if found:
        raise UnsupportedError(
            f"the model holds layers of bitsandbytes ({shortlist(found, limit=3)}): build it without their "
            "quantization_config, and pass the config to load_and_quantize_model"
        )
