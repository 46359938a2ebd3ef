"""weight_errors: how far the weights of a quantized model lie from those of its source, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn

from bigq.checkpoint import Source
from bigq.errors import CheckpointError
from bigq.formats import Format, dtype_name
from bigq.model.tree import ModelTree, nbytes_of, tensor_name
from bigq.system.text import shortlist
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.stored import Stored

__all__ = ["GroupError", "group_of", "weight_errors"]

_Found = tuple[str, int, int, float, float]  # name, bytes before and after, squares of differences and of the source
_CHUNK_NUMEL = 1 << 24  # elements compared at once: 64 MiB of float32 for each side


@dataclass(frozen=True, kw_only=True)
class GroupError:
    """The weights of alike layers, and how far they lie from the source.

    Args:
        group: their name, with "*" for numbers: "model.layers.*.mlp.up_proj.weight".
        format: "nf4" with the settings that are not the default ones; a dtype if they are not quantized.
        weights: how many tensors.
        quantized: whether they are; if not, their error is that of a cast.
        source_nbytes: bytes of these tensors in the source.
        nbytes: bytes of these tensors in the model, with scales.
        source_norm: root of the sum of the source's squares, of all tensors together.
        error: root of the squared differences' sum over that of the source's squares, of all tensors together.
        worst: the name of the tensor with the largest error of its own.
        worst_error: that error.
    """

    group: str
    format: str
    weights: int
    quantized: bool
    source_nbytes: int
    nbytes: int
    source_norm: float
    error: float
    worst: str
    worst_error: float

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON can hold them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A tensor of the model: its format, its bytes, and its numbers from one row to another."""

    format: str
    quantized: bool
    nbytes: int
    shape: tuple[int, ...]
    transposed: bool
    rows: Callable[[int, int], Tensor]
    device: torch.device


def group_of(name: str) -> str:
    """The name of a tensor with "*" in place of numbers: alike layers have one."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def weight_errors(source: Source, model: nn.Module) -> tuple[GroupError, ...]:
    """Compare every floating-point parameter of `model` with the tensor of that name in `source`.

    Reads one tensor of the source at a time, and compares some of its rows at a time, where the model's are.

    Args:
        source: the checkpoint that the model was quantized from, under the names of the model.
        model: a quantized model, on any device. It is not changed.

    Returns:
        a GroupError for each group of alike layers and format, in the order of the source.

    Raises:
        CheckpointError: the source lacks a tensor of the model, or holds it in another shape.

    Example:
        >>> import bigq, torch
        >>> from bigq.evaluation.weight_error import weight_errors
        >>> from bigq.model.in_place import ModelTensors
        >>> source = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> _ = model.load_state_dict(source.state_dict())
        >>> model = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("int8"), device_map="cpu")
        >>> for group in weight_errors(ModelTensors(source), model):
        ...     print(group.group, group.format, group.weights, group.error < 0.01)
        *.weight int8 1 True
        *.bias float32 2 True
        *.weight float32 1 True
    """
    held = dict(_held(model))
    for name, own in held.items():
        stored = source.tensors.get(name)
        if stored is not None and tuple(stored.shape) != _shape(own):
            raise CheckpointError(
                f"tensor {name!r} of {stored.where} is {list(stored.shape)}, and {list(_shape(own))} in the "
                "quantized model: the two are no versions of one model"
            )
    missing = [name for name in held if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"the source lacks {len(missing)} tensors of the quantized model: {shortlist(missing)}; "
            "pass the checkpoint that was quantized"
        )
    sums: dict[tuple[str, str, bool], list[_Found]] = {}
    for name, tensor in source.read(list(held)):
        own = held[name]
        difference, size = _squares(tensor, own)
        group = sums.setdefault((group_of(name), own.format, own.quantized), [])
        group.append((name, source.tensors[name].nbytes, own.nbytes, difference, size))
    return tuple(_group(*key, tensors) for key, tensors in sums.items())


def _group(group: str, format_name: str, quantized: bool, tensors: list[_Found]) -> GroupError:
    names, source_nbytes, nbytes, differences, sizes = zip(*tensors, strict=True)
    errors = [_ratio(*pair) for pair in zip(differences, sizes, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    return GroupError(
        group=group,
        format=format_name,
        weights=len(tensors),
        quantized=quantized,
        source_nbytes=sum(source_nbytes),
        nbytes=sum(nbytes),
        source_norm=sqrt(sum(sizes)),
        error=_ratio(sum(differences), sum(sizes)),
        worst=names[worst],
        worst_error=errors[worst],
    )


def _ratio(difference: float, size: float) -> float:
    """The relative error of squares; numbers where the source has zeros are infinitely far away."""
    return sqrt(difference / size) if size else 0.0 if not difference else float("inf")


def _shape(tensor: _Held) -> tuple[int, ...]:
    return (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]) if tensor.transposed else tensor.shape


def _squares(tensor: Tensor, held: _Held) -> tuple[float, float]:
    """The sums of the squares of the differences, and of the source."""
    if held.transposed:
        tensor = tensor.mT
    if not tensor.ndim:
        tensor = tensor.view(1)
    difference = size = 0.0
    step = max(1, _CHUNK_NUMEL * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), step):
        stop = min(start + step, len(tensor))
        rows = tensor[start:stop].to(held.device).float()
        size += rows.square().sum(dtype=torch.float64).item()
        difference += (held.rows(start, stop).float() - rows).square().sum(dtype=torch.float64).item()
    return difference, size


def _held(model: nn.Module) -> Iterator[tuple[str, _Held]]:
    """The floating-point parameters of a model and its quantized weights, each once, by one of its names."""
    tree = ModelTree(model)
    parts: set[str] = set()
    for module, paths in tree.aliases.items():
        if not isinstance(module, QuantizedModule):
            continue
        parts.update(tensor_name(path, leaf) for path in paths for leaf in module.state_spec())
        for leaf, description in module.descriptions.items():
            stored = module.stored_weight(leaf)
            yield (
                tensor_name(paths[0], leaf),
                _Held(
                    format=_said(description.format),
                    quantized=True,
                    nbytes=description.nbytes,
                    shape=tuple(stored.shape),
                    transposed=stored.transposed,
                    rows=partial(_decoded, stored),
                    device=stored.state["packed"].device,
                ),
            )
    for group in tree.tensors:
        tensor = group.tensor
        if group.is_buffer or not tensor.is_floating_point() or parts & {*group.names}:
            continue
        flat = tensor.detach().view(1) if not tensor.ndim else tensor.detach()
        yield (
            group.names[0],
            _Held(
                format=dtype_name(tensor.dtype),
                quantized=False,
                nbytes=nbytes_of(tensor),
                shape=tuple(tensor.shape),
                transposed=False,
                rows=partial(_cut, flat),
                device=tensor.device,
            ),
        )


def _decoded(weight: Stored, start: int, stop: int) -> Tensor:
    part, state = weight.format.select(weight.state, weight.shape, slice(start, stop))
    return part.dequantize(state, (stop - start, *weight.shape[1:]), torch.float32)


def _cut(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def _said(weight_format: Format) -> str:
    """A format in a word, and the settings that are not the default ones: "nf4 block_size=32"."""
    default = type(weight_format)().describe()
    other = [f"{name}={value}" for name, value in weight_format.describe().items() if value != default[name]]
    return " ".join([weight_format.name, *other])
