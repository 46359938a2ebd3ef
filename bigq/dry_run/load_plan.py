"""LoadPlan: what a load would make of every tensor, and where it would store it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod

from bigq.checkpoint import StoredTensor
from bigq.footprint import KINDS, MemoryFootprint
from bigq.formats import dtype_name
from bigq.model.tree import ModelTree
from bigq.planning.automatic import copies_nbytes
from bigq.planning.device_map import DeviceMap, as_user_map, execution_device
from bigq.planning.plan import Plan, PlannedTensor, PlannedWeight
from bigq.planning.storage_places import storage_places
from bigq.system.text import bytes_text, format_table

__all__ = ["LoadPlan", "TensorPlan", "describe_plan"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a name that counts, such as that of a layer
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
_SETTINGS = {"block_size": 64, "double_quant": False, "threshold": 6.0}  # those that the table leaves out


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What a load would make of one tensor of a model, or of one weight that becomes quantized.

    Args:
        names: all of its names in the model; several if it is tied.
        shape: in the model.
        is_buffer: whether it is a buffer; otherwise it is a parameter.
        is_quantized: whether it becomes, or stays, a quantized weight.
        source_dtype: its dtype in the checkpoint, or in the model where nothing is read for it; the name of the format
            if the checkpoint holds it quantized.
        format: the name of its format, such as "nf4", if it becomes quantized; otherwise the dtype that it gets.
        settings: those of the format, by name; none if it is kept.
        device: where it is stored: "cuda:0", "cpu" or "disk".
        nbytes_before: bytes in the checkpoint, or in the model where nothing is read for it.
        packed_nbytes: bytes of the codes; 0 if it is kept.
        nbytes: bytes after the load: of codes, scales and description, or of the tensor that is kept.
        why: the rule by which it is quantized or kept.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    is_buffer: bool
    is_quantized: bool
    source_dtype: str
    format: str
    settings: Mapping[str, str | int | float | bool]
    device: str
    nbytes_before: int
    packed_nbytes: int
    nbytes: int
    why: str

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def numel(self) -> int:
        """How many numbers it holds, each weight as its original number."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What `load_and_quantize_model` would do, tensor by tensor: what `bigq.plan` returns.

    Args:
        tensors: every parameter and buffer of the model, in module order, each once.
        device_map: {module or parameter name: GPU index, "cpu" or "disk"}, as it was given or made.
        runs_on: the device that runs offloaded modules.
        copies_nbytes: {device: bytes} of the copies of offloaded tensors that a device holds at most at a time while
            the model runs, in addition to what is stored on it.
    """

    tensors: tuple[TensorPlan, ...]
    device_map: Mapping[str, int | str]
    runs_on: str
    copies_nbytes: Mapping[str, int]

    @property
    def nbytes(self) -> dict[str, dict[str, int]]:
        """{device: {kind: bytes}} after the load, as `bigq.memory_footprint` of the loaded model counts them.

        The kinds are "packed" (codes), "scales" (all other tensors of quantized weights) and "kept".
        """
        found: dict[str, dict[str, int]] = {}
        for tensor in self.tensors:
            of_device = found.setdefault(tensor.device, dict.fromkeys(KINDS, 0))
            of_device["packed"] += tensor.packed_nbytes
            of_device["scales" if tensor.is_quantized else "kept"] += tensor.nbytes - tensor.packed_nbytes
        return found

    @property
    def total_nbytes(self) -> int:
        """Bytes after the load, on all devices."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes_before(self) -> int:
        """Bytes of the same tensors before the load."""
        return sum(tensor.nbytes_before for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """How many parameters the model has, each quantized weight as its original number. Tied ones count once."""
        return sum(tensor.numel for tensor in self.tensors if not tensor.is_buffer)

    @property
    def quantized_share(self) -> float:
        """The share of the parameters that is quantized, from 0 to 1."""
        quantized = sum(tensor.numel for tensor in self.tensors if tensor.is_quantized)
        return quantized / self.parameters if self.parameters else 0.0

    def table(self, width: int = 100) -> str:
        """The plan as text, at most `width` characters wide, 80 or more.

        First the tensors, under the rule by which they are quantized or kept; tensors that differ by a number in their
        name are one line. Then the bytes by device and kind, in MB (1e6 bytes), and the sums.
        """
        sections: dict[str, dict[tuple[str, ...], list[TensorPlan]]] = {}
        for tensor in self.tensors:
            key = (
                _NUMBER.sub("*", tensor.name.removesuffix(".weight")) + (" (tied)" if len(tensor.names) > 1 else ""),
                "x".join(map(str, tensor.shape)) or "scalar",
                _short(tensor.source_dtype),
                _label(tensor),
                tensor.device,
            )
            sections.setdefault(tensor.why, {}).setdefault(key, []).append(tensor)
        rows = [("name, without .weight", "count", "shape", "from", "to", "device", "MB")]
        titles: dict[int, str] = {}  # by the row before which each stands
        for why, alike in sections.items():
            titles[len(rows)] = why
            for (name, *cells), found in alike.items():
                mega = f"{sum(tensor.nbytes for tensor in found) / 1e6:.3f}"
                rows.append((f"  {name}", str(len(found)), *cells, mega))  # type: ignore[arg-type]
        rest = sum(max(len(row[i]) for row in rows) + 2 for i in range(1, 7))
        limit = max(21, max(80, width) - rest)
        lines = format_table([(_end(row[0], limit), *row[1:]) for row in rows]).splitlines()
        body = [part for i, line in enumerate(lines) for part in ([titles[i] + ":", line] if i in titles else [line])]
        return "\n".join([*body, "", MemoryFootprint(nbytes=self.nbytes).table(), "", self.summary()])

    def summary(self) -> str:
        """A few lines: the share of quantized parameters, bytes before and after, and those of copies."""
        bits = 8 * self.total_nbytes / self.parameters if self.parameters else 0.0
        lines = [
            f"{self.quantized_share:.1%} of {self.parameters:,} parameters are quantized",
            f"{bytes_text(self.nbytes_before)} become {bytes_text(self.total_nbytes)}, {bits:.2f} bits a parameter",
        ]
        lines += [
            f"copies of offloaded tensors on {device} while the model runs: at most {bytes_text(nbytes)}"
            for device, nbytes in self.copies_nbytes.items()
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON can hold it."""
        return {
            "tensors": [{**asdict(t), "settings": dict(t.settings)} for t in self.tensors],
            "device_map": dict(self.device_map),
            "runs_on": self.runs_on,
            "copies_nbytes": dict(self.copies_nbytes),
            "nbytes": self.nbytes,
            "total_nbytes": self.total_nbytes,
            "nbytes_before": self.nbytes_before,
            "parameters": self.parameters,
            "quantized_share": self.quantized_share,
        }


def describe_plan(tree: ModelTree, plan: Plan, places: DeviceMap, tensors: Mapping[str, StoredTensor]) -> LoadPlan:
    """`plan` for the model of `tree` as a LoadPlan.

    Args:
        places: the device map.
        tensors: what the source of the load holds.
    """
    stored = storage_places(plan, places)
    parts = plan.weights_of_state()
    weights = {name: weight for weight in plan.weights for name in weight.names}
    kept = {tensor.names[0]: tensor for tensor in plan.tensors if tensor.names[0] not in parts}
    rows = []
    for group in tree.tensors:  # in module order: a plan has the weights apart
        name = group.names[0]
        if name in weights:
            rows.append(_of_weight(weights[name], plan, stored, tensors))
        else:
            own = dtype_name(group.tensor.dtype)
            rows.append(_of_tensor(kept[name], plan, stored, tensors, own))
    return LoadPlan(
        tensors=tuple(rows),
        device_map=as_user_map(places),
        runs_on=str(execution_device(places)),
        copies_nbytes={place: n for place, n in copies_nbytes(tree.model, plan, places).items() if n},
    )


def _of_weight(
    weight: PlannedWeight, plan: Plan, stored: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> TensorPlan:
    own, packed = weight.description.format, weight.tensor_name("packed")
    if weight.source is not None:
        source_dtype, before = dtype_name(tensors[weight.source].dtype), tensors[weight.source].nbytes
        device, why = stored[weight.names[0]], plan.rules.get(_owner(weight.names[0]), "quantized")
    else:
        held = [next((tensors[name] for name in names if name in tensors), None) for names in weight.specs()]
        source_dtype, before = own.name, sum(part.nbytes for part in held if part is not None)
        device, why = stored[packed], "quantized in the checkpoint"
    return TensorPlan(
        names=weight.names,
        shape=weight.description.weight_shape,
        is_buffer=False,
        is_quantized=True,
        source_dtype=source_dtype,
        format=own.name,
        settings={name: value for name, value in own.describe().items() if name != "format"},
        device=device,
        nbytes_before=before,
        packed_nbytes=weight.description.state_spec["packed"].nbytes,
        nbytes=weight.nbytes,
        why=why,
    )


def _of_tensor(
    tensor: PlannedTensor,
    plan: Plan,
    stored: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
    own_dtype: str,
) -> TensorPlan:
    source = None if tensor.source is None else tensors[tensor.source]
    if tensor.is_buffer:
        why = "buffer"
    elif len(tensor.spec.shape) < 2:
        why = "fewer than two dimensions"
    else:
        reasons = (plan.kept[_owner(name)] for name in tensor.names if _owner(name) in plan.kept)
        why = next(reasons, "not a linear or experts, and not named")
    return TensorPlan(
        names=tensor.names,
        shape=tensor.spec.shape,
        is_buffer=tensor.is_buffer,
        is_quantized=False,
        source_dtype=own_dtype if source is None else dtype_name(source.dtype),
        format=dtype_name(tensor.spec.dtype),
        settings={},
        device=stored[tensor.names[0]],
        nbytes_before=tensor.spec.nbytes if source is None else source.nbytes,
        packed_nbytes=0,
        nbytes=tensor.spec.nbytes,
        why=why,
    )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _label(tensor: TensorPlan) -> str:
    """The format with the settings that are not the usual ones, or the dtype."""
    other = [f"{key}={value}" for key, value in tensor.settings.items() if _SETTINGS.get(key, value) != value]
    words: Iterable[str] = (f"b{word.removeprefix('block_size=')}" if "block" in word else word for word in other)
    return " ".join([_short(tensor.format), *("dq" if "double" in word else word for word in words)])


def _short(dtype: str) -> str:
    return _SHORT.get(dtype, dtype)


def _end(name: str, limit: int) -> str:
    """The end of a name that is too long, which says more than its beginning."""
    return name if len(name) <= limit else f"  ..{name[4 - limit :]}"
