"""ParameterCount: `num_parameters()` of a transformers model with quantized weights."""

from typing import Any
from weakref import ref

from torch import nn

from bigq.footprint import num_parameters
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["ParameterCount", "count_weights"]


class ParameterCount:
    """Replaces `model.num_parameters`, which would count the packed tensors of quantized weights.

    It is a class and not a closure, so that the model pickles. It does not keep the model alive: with a reference
    cycle, the memory of a deleted model would be freed only by the garbage collector.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters as transformers does, each quantized weight as its original number of elements."""
        model = self._model()
        assert model is not None
        total = num_parameters(model, only_trainable=only_trainable)
        if exclude_embeddings:
            embeddings = {module for module in model.modules() if isinstance(module, nn.Embedding)}
            total -= sum(_of_embedding(module, only_trainable) for module in embeddings)
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParameterCount":
        return ParameterCount(memo[id(self._model())])

    def __reduce__(self) -> tuple[Any, ...]:
        return ParameterCount, (self._model(),)


def count_weights(model: nn.Module) -> None:
    """Replace `model.num_parameters`, if the model has such a method, as transformers' models do."""
    if hasattr(type(model), "num_parameters"):
        model.__dict__["num_parameters"] = ParameterCount(model)


def _of_embedding(module: nn.Embedding, only_trainable: bool) -> int:
    if isinstance(module, QuantizedModule):
        return 0 if only_trainable else module.num_embeddings * module.embedding_dim
    return 0 if only_trainable and not module.weight.requires_grad else module.weight.numel()
