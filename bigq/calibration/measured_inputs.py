"""MeasuredInputs: the sums of squares of what a model multiplies its weights with, while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigq.formats import state_name
from bigq.model.experts import holds_experts_in_matrices, is_transposed
from bigq.model.selection import candidates
from bigq.model.tree import ModelTree, tensor_key
from bigq.offload.containers import first_tensor
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["MeasuredInput", "MeasuredInputs"]

_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_CODES = "packed"  # the part of a quantized weight whose name in the model tells that of the weight


@dataclass(kw_only=True, eq=False)
class MeasuredInput:
    """The inputs of one weight with K = `in_features`: `squares` is the sum of x^2 over `tokens`, float64 [K]."""

    leaf: str
    in_features: int
    squares: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Count the tokens of x [..., K]."""
        rows = torch.cat(x.detach().unbind()) if x.is_nested else x.detach()
        rows = rows.reshape(-1, self.in_features)
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        self.squares = squares if self.squares is None else self.squares.to(squares.device) + squares
        self.tokens += len(rows)

    def mean(self) -> Tensor | None:
        """The mean of x^2, float32 [K] on the CPU; None if there was no token."""
        return None if self.squares is None or not self.tokens else (self.squares / self.tokens).float().cpu()


class MeasuredInputs:
    """What each weight that may be quantized is multiplied with. The model is changed only within `watched`.

    Args:
        tree: of the model. Its weights may be floats or quantized, resident or offloaded.
    """

    def __init__(self, tree: ModelTree) -> None:
        self.inputs: dict[str, MeasuredInput] = {}  # by the first name of the weight in the model
        self._of_module: dict[nn.Module, list[MeasuredInput]] = {}
        names = {tensor_key(group.tensor): group.names[0] for group in tree.tensors}
        for module in tree.aliases:
            for leaf, in_features, held in _weights_of(module):
                name = names[tensor_key(held)]
                if held is not module._parameters.get(leaf):
                    name = name.removesuffix(state_name("", _CODES))
                measured = self.inputs.setdefault(name, MeasuredInput(leaf=leaf, in_features=in_features))
                self._of_module.setdefault(module, []).append(measured)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Measure the calls of the modules that hold the weights. Hooks are removed at the end, also by an error."""
        with ExitStack() as stack:
            for module, inputs in self._of_module.items():
                watch = _Watch(module, inputs)
                stack.callback(module.register_forward_pre_hook(watch.begin, with_kwargs=True).remove)
                if watch.reads is not None:
                    stack.callback(module.register_forward_hook(watch.end, always_call=True).remove)
            yield


def _weights_of(module: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """(leaf, K, the Parameter that holds it or its codes) of the weights of `module` that a product may read."""
    if holds_experts_in_matrices(module):
        return
    own = candidates(module)  # of a quantized stack, its parts
    described = module.descriptions if isinstance(module, QuantizedModule) else {}
    parts = {state_name(leaf, part) for leaf, description in described.items() for part in description.state_spec}
    for leaf, description in described.items():
        codes = module._parameters[state_name(leaf, _CODES)]
        if codes is not None and (leaf in own or state_name(leaf, _CODES) in own):
            yield leaf, description.shape[-1], codes
    for leaf in own:
        weight = module._parameters.get(leaf)
        if weight is not None and leaf not in parts:
            yield leaf, weight.shape[-2 if is_transposed(module) else -1], weight


class _Watch:
    """Hooks of one module: its input is that of its weight. Of fused experts, `reads` sees each product too."""

    def __init__(self, module: nn.Module, inputs: list[MeasuredInput]) -> None:
        self._inputs = inputs
        held = [module._parameters.get(measured.leaf) for measured in inputs]
        is_stack = any(weight is not None and weight.dim() == 3 for weight in held)
        self.reads = _Reads(module, inputs) if is_stack else None
        self._is_inside = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the forward."""
        x = first_tensor((args, dict(kwargs)))
        if self.reads is None:
            _add_to(self._inputs, x)
        else:
            self.reads.x, self._is_inside = x, True
            self.reads.__enter__()  # type: ignore[no-untyped-call]

    def end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """After the forward, or an error in it."""
        if self.reads is not None and self._is_inside:  # not if another hook failed before `begin`
            self._is_inside = False
            self.reads.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            _add_to(self.reads.unread(), self.reads.x)
            self.reads.x = None


def _add_to(inputs: list[MeasuredInput], x: Tensor | None) -> None:
    """Count the input of a module for its weights. The second of two products, `down_proj`, has another input."""
    for measured in inputs:
        if x is None or not x.is_floating_point() or x.dim() == 0 or "down" in measured.leaf:
            continue
        if x.shape[-1] == measured.in_features:
            measured.add(x)


class _Reads(TorchFunctionMode):
    """Sees the products of torch in the forward of fused experts, and which weight each of them reads."""

    def __init__(self, module: nn.Module, inputs: list[MeasuredInput]) -> None:
        super().__init__()
        self.x: Tensor | None = None  # the input of the module
        self._module, self._inputs = module, inputs
        self._read: set[str] = set()

    def unread(self) -> list[MeasuredInput]:
        """The inputs of the weights that no product was seen to read, such as entries that were copied before."""
        return [measured for measured in self._inputs if measured.leaf not in self._read]

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").partition(".")[0] in _PRODUCTS:
            for x, weight in pairwise(args):
                self._note(x, weight)
        return func(*args, **(kwargs or {}))

    def _note(self, x: object, weight: object) -> None:
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dim() < 2:
            return
        for measured in self._inputs:
            whole = self._module._parameters.get(measured.leaf)  # an offloaded module has another one in each call
            if whole is not None and _is_part(weight, whole) and x.shape[-1] == measured.in_features:
                self._read.add(measured.leaf)
                measured.add(x)


def _is_part(weight: Tensor, whole: Tensor) -> bool:
    """Whether `weight` lies in the memory of `whole`, as an entry or a transpose of it does."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or whole.is_meta:
        return False
    return whole.data_ptr() <= weight.data_ptr() < whole.data_ptr() + whole.nbytes
