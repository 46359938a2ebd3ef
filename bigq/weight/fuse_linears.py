"""fuse_linears: quantized linears that read the same tensor are computed in one launch, if it is for few tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedError
from bigq.ops.sharding import is_sharded
from bigq.system.internals import SEES_EDITS, version_of
from bigq.weight.fused_rows import ALIGNMENT, FusedPart, FusedRows
from bigq.weight.linear import QuantizedMatrix

__all__ = ["FusedLinears", "fuse_linears", "unfuse_linears"]


class FusedLinears(NamedTuple):
    """What `fuse_linears` did.

    Args:
        groups: the names of the linears of each launch.
        left: {names of linears that read the same tensor: why they are not fused}.
    """

    groups: list[tuple[str, ...]]
    left: dict[tuple[str, ...], str]


class _Call(NamedTuple):
    linear: QuantizedMatrix
    x: Tensor
    edits: int  # of x
    tensors: tuple[Tensor | None, ...]


def fuse_linears(model: nn.Module, *args: Any, **kwargs: Any) -> FusedLinears:
    """Let quantized linears that read the same tensor, as those of q, k and v do, be computed in one launch.

    The linears are found by one call of the model: those that are called one after the other with the same tensor, and
    have one format, width, device and dtype. Their rows are put one behind the other in memory. Names, shapes, numbers
    and files of the Parameters stay as they are, and no memory is added.

    From then on, the first of them that is called with up to 16 tokens, in compiled code with one, computes the product
    for all, and the others take their columns of it. A linear computes by itself, as before,

    - with more tokens, where gradients are enabled, and while torch.export or a transform of functorch traces. Before
      torch 2.13 a strict export is an error: call `unfuse_linears` before it;
    - if it is called with another tensor than the first one was, or in another order, or if the tensor or a weight was
      written to between the two calls. In graphs of torch.compile, and with tensors of inference mode, writes to the
      tensor are not seen: there it has to be as in the call that is made here, in which all writes are seen. Nor do
      these graphs see that `.data` of a Parameter is assigned: call `unfuse_linears` before, and compile again;
    - from the moment when one of the group is moved, cast, sharded, offloaded or given another weight.

    The numbers have the bits that they have without, where one kernel computes the small and the large weight. On
    Hopper it does for linears of 1024 rows and more whose width is a multiple of 256. Elsewhere they differ by
    rounding.

    Call it last: when the model is on its device, and before torch.compile and before CUDA graphs are captured.
    Adapters of PEFT may be added before and after it. Weights with double quantization are not fused: each has its own
    mean of scales.

    Args:
        model: with quantized linears. What was fused before is fused anew.
        *args: of a call of the model, such as a few token ids. It is run in eager mode, without gradients.
        **kwargs: of that call.

    Returns:
        The names of the linears by launch, and what was left out, and why.

    Raises:
        UnsupportedError: nothing can be fused.

    Example:
        >>> import bigq, torch
        >>> class Gated(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate, self.up = torch.nn.Linear(64, 96), torch.nn.Linear(64, 96)
        ...     def forward(self, x):
        ...         return self.gate(x).sigmoid() * self.up(x)
        >>> config = bigq.QuantizationConfig("nf4", skip_defaults=False)
        >>> model = bigq.load_and_quantize_model(Gated(), None, config, device_map="cpu")
        >>> bigq.fuse_linears(model, torch.ones(1, 64)).groups
        [('gate', 'up')]
        >>> with torch.no_grad():
        ...     model(torch.ones(1, 64)).shape
        torch.Size([1, 96])
    """
    unfuse_linears(model)
    names = {module: name for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}
    calls: list[_Call] = []
    with _recorded(list(names), calls), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(*args, **kwargs)
    groups: list[tuple[str, ...]] = []
    left: dict[tuple[str, ...], str] = {}
    moved: set[int] = set()  # Parameters, by identity: to move one again would take it from its group
    for run in _runs(calls):
        for alike in _alike(run):
            members = tuple(names[call.linear] for call in alike)
            held = [id(tensor) for call in alike for tensor in call.tensors if tensor is not None]
            why = _why_not(alike) or ("they are tied" if len({*held} - moved) < len(held) else "")
            if why:
                left[members] = why
                continue
            groups.append(members)
            moved.update(held)
            _fuse([call.linear for call in alike])
    if not groups:
        what = f"{len(names)} quantized linears, of which {len({call.linear for call in calls})} were called"
        why = "; ".join(f"{', '.join(members)}: {reason}" for members, reason in list(left.items())[:3])
        raise UnsupportedError(
            f"{type(model).__name__} has {what}, and none can be fused: "
            + (why or "no two of them were called one after the other with the same tensor, in one format and width")
        )
    return FusedLinears(groups, left)


def unfuse_linears(model: nn.Module) -> None:
    """Undo `fuse_linears`: each linear of `model` computes by itself. The Parameters stay where they are in memory."""
    for module in model.modules():
        if isinstance(module, QuantizedMatrix):
            module.unfuse()


@contextmanager
def _recorded(linears: Sequence[QuantizedMatrix], calls: list[_Call]) -> Iterator[None]:
    """Note the calls of `linears` in the context: what stands for a FusedPart there computes nothing."""

    def recorder(linear: QuantizedMatrix) -> Callable[[tuple[Tensor | None, ...], Tensor], None]:
        def note(tensors: tuple[Tensor | None, ...], x: Tensor) -> None:
            calls.append(_Call(linear, x, _edits(x), tensors))  # which holds x, so that no other gets its identity

        return note

    try:
        for linear in linears:
            vars(linear)["_fused"] = recorder(linear)
        yield
    finally:
        for linear in linears:
            vars(linear).pop("_fused", None)


def _edits(x: Tensor) -> int:
    """A number that is another one after a write to x."""
    if SEES_EDITS and not x.is_inference():
        return version_of(x)
    return hash(x.detach().double().cpu().numpy().tobytes())


def _runs(calls: Sequence[_Call]) -> list[list[_Call]]:
    """The linears that are called one after the other with the same tensor, and are in all of their calls."""
    runs = [list(run) for _, run in groupby(calls, lambda call: (id(call.x), call.edits))]
    seen: dict[QuantizedMatrix, set[tuple[int, ...]]] = {}
    for run in runs:
        members = tuple(id(call.linear) for call in run)
        for call in run:
            seen.setdefault(call.linear, set()).add(members)
    first = {tuple(id(call.linear) for call in run): run for run in reversed(runs) if len(run) > 1}
    return [run for members, run in reversed(first.items()) if all(len(seen[call.linear]) == 1 for call in run)]


def _alike(run: Sequence[_Call]) -> list[list[_Call]]:
    """The calls of a run by what one launch has in common, in their order."""
    by_kind: dict[Any, list[_Call]] = {}
    for call in run:
        linear, width = call.linear, call.linear.description.shape[1]
        where = [None if tensor is None else (tensor.device, tensor.dtype) for tensor in call.tensors]
        kind = (linear.format, width, linear.compute_dtype, *where)
        by_kind.setdefault(kind, []).append(call)
    return [calls for calls in by_kind.values() if len(calls) > 1]


def _why_not(calls: Sequence[_Call]) -> str:
    """Why these linears cannot be fused; empty if they can."""
    linears = [call.linear for call in calls]
    if len(set(linears)) < len(linears):
        return "one of them is called twice with the same tensor"
    wide, specs = linears[0].format, [linear.description.state_spec for linear in linears]
    rows = sum(linear.description.shape[0] for linear in linears)
    for part, spec in wide.state_spec((rows, linears[0].description.shape[1])).items():
        if spec.shape[0] != sum(own[part].shape[0] for own in specs):
            return f"{wide!r} stores numbers of a whole weight in {part!r}, and these weights have different ones"
    if any(type(linear).forward is not QuantizedMatrix.forward for linear in linears):
        return "one of them has a forward of its own"
    for call in calls:
        _, tensors = call.linear.operands()
        if any(tensor is not held for tensor, held in zip(tensors, call.tensors, strict=True)):
            return "one of them is offloaded, so its Parameters are others in each call"
        for tensor in [tensor for tensor in tensors if tensor is not None]:
            if is_sharded(tensor) or tensor.is_meta or not isinstance(tensor, nn.Parameter):
                return "a Parameter of one of them is sharded, on meta, or no Parameter"
            if tensor.nbytes % ALIGNMENT:
                return f"{tensor.nbytes} bytes of a Parameter of one of them are no multiple of {ALIGNMENT}"
    return ""


def _fuse(linears: Sequence[QuantizedMatrix]) -> None:
    product, _ = linears[0].operands()
    sizes = [linear.description.shape[0] for linear in linears]
    rows = FusedRows(sizes, product, linears[0].compute_dtype, [linear.operands()[1] for linear in linears])
    for index, linear in enumerate(linears):
        vars(linear)["_fused"] = FusedPart(rows, index)
