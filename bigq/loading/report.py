"""QuantizationReport: what a load did: how long each stage took, and what became of each module."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bigq.formats import dtype_name
from bigq.loading.timings import Timings
from bigq.planning.coverage import quantized_share
from bigq.planning.plan import Plan
from bigq.system.text import format_table

__all__ = ["ModuleReport", "QuantizationReport", "StageReport", "make_report", "stage_reports"]


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """Seconds and bytes of one stage of a load."""

    name: str
    seconds: float
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """What became of a module that holds tensors of its own: why, in which format, where, and how many bytes it takes.

    `format` is "nf4", "fp4", "int8" or the dtypes of what is kept; `device` is "cuda:0", "cpu" or "disk".
    """

    name: str
    rule: str
    format: str
    device: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What `load_and_quantize_model` did, as `model.quantization_report`.

    `stages`: "plan" (open, check, place), "wait" (for data, and for Triton to start), "decode" (codes with scales to
    numbers, where there are any), "quantize" (and place) and "commit" follow each other in the calling thread. On a GPU
    "decode" and "quantize" are the time to queue that. "read" and "copy" (waiting for a chunk's copy to the GPU) run
    beside them in the reading threads; their seconds are those of all threads together. So does "shard", in a load into
    shards.
    `modules`: every module that holds tensors, under its first name; a tied tensor counts at the first of its modules.
    `quantized_share`: how many of all numbers in parameters are quantized, from 0 to 1.
    """

    stages: tuple[StageReport, ...]
    modules: tuple[ModuleReport, ...]
    quantized_share: float

    def table(self) -> str:
        """The stages, the modules (those that only differ by name in one line), and the share that is quantized."""
        rows = [("stage", "seconds", "GB")]
        rows += [(stage.name, f"{stage.seconds:.3f}", f"{stage.nbytes / 1e9:.3f}") for stage in self.stages]
        alike: dict[tuple[str, str, str], list[int]] = {}
        for module in self.modules:
            alike.setdefault((module.rule, module.format, module.device), []).append(module.nbytes)
        modules = [("rule", "format", "device", "modules", "MB")]
        modules += [(*key, str(len(nbytes)), f"{sum(nbytes) / 1e6:.3f}") for key, nbytes in alike.items()]
        share = f"{100 * self.quantized_share:.1f} % of the numbers in parameters are quantized."
        return f"{format_table(rows)}\n\n{format_table(modules)}\n\n{share}"


def stage_reports(timings: Timings) -> tuple[StageReport, ...]:
    """The stages of a load so far, in the order in which they began."""
    return tuple(
        StageReport(name=name, seconds=seconds, nbytes=nbytes) for name, (seconds, nbytes) in timings.totals.items()
    )


def make_report(plan: Plan, places: Mapping[str, str], timings: Timings) -> QuantizationReport:
    """The report on a load that carried out `plan`; `places` is what `storage_places` says of it."""
    formats: dict[str, list[str]] = {}  # of the quantized weights of each module
    parts: dict[str, list[tuple[str, str, int]]] = {}  # by module: dtype or format, place and bytes of what it holds
    for tensor in plan.tensors:
        name, spec = tensor.names[0], tensor.spec
        part = (dtype_name(spec.dtype), places[name], spec.nbytes)
        parts.setdefault(name.rpartition(".")[0], []).append(part)
    for weight in plan.weights:
        name = weight.names[0]
        owner = name.rpartition(".")[0]
        formats.setdefault(owner, []).append(weight.description.format.name)
        if weight.source is not None:
            parts.setdefault(owner, []).append((weight.description.format.name, places[name], weight.nbytes))
    modules = [
        ModuleReport(
            name=name,
            rule=plan.rules.get(name, "quantized") if name in formats else plan.kept.get(name, "no weight to quantize"),
            format=_joined(formats[name]) if name in formats else _joined(dtypes),
            device=_joined(devices),
            nbytes=sum(sizes),
        )
        for name, held in parts.items()
        for dtypes, devices, sizes in [zip(*held, strict=True)]
    ]
    return QuantizationReport(
        stages=stage_reports(timings),
        modules=tuple(modules),
        quantized_share=quantized_share(plan),
    )


def _joined(words: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(words))
