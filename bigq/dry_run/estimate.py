"""estimate_memory: the memory that a model needs to be loaded, to generate and to be trained, from headers alone."""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from accelerate.utils import get_max_memory

from bigq.checkpoint import Checkpoint
from bigq.config import QuantizationConfig
from bigq.dry_run.limits import as_limits, as_max_memory
from bigq.dry_run.load_plan import LoadPlan
from bigq.dry_run.memory_estimate import MemoryEstimate, MemoryItem
from bigq.dry_run.plan import plan_model, with_revision
from bigq.dry_run.run_memory import RunMemory
from bigq.errors import ConfigError, PlacementError
from bigq.integrations.skeleton import build_skeleton
from bigq.loading.stream import READ_BUDGET_NBYTES
from bigq.planning.device_map import STRATEGIES

__all__ = ["TRAININGS", "estimate_memory"]

TRAININGS = ("none", "qlora")


def estimate_memory(
    name_or_folder: str | os.PathLike[str],
    quantization_config: QuantizationConfig | object | None = None,
    device_map: str | int | torch.device | Mapping[str, int | str | torch.device] | None = None,
    *,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: str | torch.dtype | None = None,
    context: int = 2048,
    batch: int = 1,
    train: str = "none",
    rank: int = 16,
    read_budget: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MemoryEstimate:
    """Say how much memory a model needs on each device, item by item, and how each number is made. Loads nothing.

    What follows from shapes is exact: weights, copies of offloaded blocks, the cache, adapters and their optimizer.
    Activations are formulas, which the items show. What nobody can say is unknown, and then so may be whether it fits.
    CUDA itself takes some hundred MB on each GPU, which are not counted.

    Args:
        name_or_folder: a folder with a config.json and weights, or a Hub repo; of that only configs and headers are
            downloaded.
        quantization_config: as in `load_and_quantize_model`. None: for a checkpoint that is quantized.
        device_map: as in `load_and_quantize_model`. None: "auto" with `max_memory`, otherwise one GPU. GPUs need not be
            those of this machine.
        max_memory: {GPU index or "cpu": bytes, or a string such as "12GiB"}. An automatic map gets what is left of it
            beside everything but the weights. None: the free memory of this machine.
        offload_folder, offload: as in `load_and_quantize_model`.
        context: tokens of a sequence: the prompt and what is generated, or those of a training example.
        batch: sequences at a time.
        train: "qlora" for LoRA adapters on every linear but the output head, with gradient checkpointing and AdamW;
            "none" for generation.
        rank: of the adapters.
        read_budget: as in `load_and_quantize_model`. None: 768 MiB.
        revision, trust_remote_code: as in `bigq.plan`.

    Raises:
        ConfigError: an argument is out of its range.
        CheckpointError, UnsupportedError: as `bigq.plan` does.

    Example:
        >>> import json, pathlib, tempfile
        >>> import safetensors.torch, torch
        >>> from bigq.dry_run.estimate import estimate_memory
        >>> said = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(said))
        ...     weights = {n: torch.zeros(p.shape) for n, p in build_skeleton(folder).named_parameters()}
        ...     safetensors.torch.save_file(weights, f"{folder}/model.safetensors")
        ...     found = estimate_memory(folder, "nf4", max_memory={0: "1GiB"}, context=100)
        >>> [(item.name, item.nbytes) for item in found.items if item.is_exact]
        [('weights', 13192448), ('KV cache', 102400)]
        >>> found.fits
        True
    """
    for name, value in (("context", context), ("batch", batch), ("rank", rank)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")
    if train not in TRAININGS:
        raise ConfigError(f"train is {train!r}; expected one of {list(TRAININGS)}")
    if device_map is None:
        device_map = "auto" if max_memory is not None else {"": 0}
    model = build_skeleton(name_or_folder, revision=revision, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open_headers(with_revision(name_or_folder, revision))

    def planned(where: object, limits: Mapping[int | str, int | str] | None = None) -> LoadPlan:
        return plan_model(
            model,
            checkpoint,
            quantization_config,
            where,
            max_memory=limits,
            offload_folder=offload_folder,
            offload=offload,
            other_machine=True,
        )

    phase = "generate" if train == "none" else "train"
    resident = planned({"": 0})
    run = RunMemory(model, resident, batch=batch, context=context)

    def beside(made: LoadPlan) -> list[MemoryItem]:
        return run.generate(made) if train == "none" else run.train(made, rank)

    budget = min(READ_BUDGET_NBYTES if read_budget is None else read_budget, resident.nbytes_before)
    limits = as_limits(get_max_memory() if max_memory is None else max_memory)
    rest = problem = strategy = None
    if isinstance(device_map, str) and device_map in STRATEGIES:
        strategy = device_map
        try:
            made, rest = _automatic(partial(planned, device_map), beside, limits, budget)
        except PlacementError as error:
            made, problem = resident, str(error)
    else:
        made = planned(device_map)
    items = [*_weights(made, phase), *beside(made), *_loading(made, budget)]
    return MemoryEstimate(
        items=tuple(items),
        plan=made,
        limits=limits,
        strategy=strategy,
        max_memory=None if rest is None else as_max_memory(rest),
        problem=problem,
    )


def _automatic(
    planned: Callable[[Mapping[int | str, int | str]], LoadPlan],
    beside: Callable[[LoadPlan], list[MemoryItem]],
    limits: Mapping[str, int],
    budget: int,
) -> tuple[LoadPlan, dict[str, int]]:
    """The plan with an automatic map that leaves memory for what is `beside` the weights, and its max_memory.

    What is beside the weights depends on the map, and the map on that. The memory that is left only shrinks.
    """
    rest = dict(limits)
    while True:
        try:
            made = planned(as_max_memory(rest))
        except PlacementError as error:
            if rest == limits:
                raise
            raise PlacementError(f"beside what else is needed, {error}") from error
        needs = _by_device(beside(made))
        smaller = {
            device: min(rest[device], max(0, limit - max(needs.get(device, 0), budget))) if device != "disk" else limit
            for device, limit in limits.items()
        }
        if smaller == rest:
            return made, rest
        rest = smaller


def _weights(made: LoadPlan, phase: str) -> list[MemoryItem]:
    """The items of what is stored, and of the copies that run offloaded blocks in `phase`."""
    stored = "codes, scales and kept tensors, from the headers: the bytes of bigq.memory_footprint after the load"
    copied = "copies of the largest offloaded blocks, two at a time, and of what is offloaded around blocks"
    rows = [("weights", "always", device, sum(kinds.values()), stored) for device, kinds in made.nbytes.items()]
    rows += [("copies", phase, device, nbytes, copied) for device, nbytes in made.copies_nbytes.items()]
    return [
        MemoryItem(name=name, phase=when, device=device, nbytes=nbytes, how=how, is_exact=True)
        for name, when, device, nbytes, how in rows
    ]


def _loading(made: LoadPlan, budget: int) -> list[MemoryItem]:
    """The items of weights that are being read: on the host, and on each GPU that weights are stored on."""
    how = "read_budget, 768 MiB by default: weights on their way, beside the result"
    devices = dict.fromkeys(["cpu", *(device for device in made.nbytes if device.startswith("cuda"))])
    return [
        MemoryItem(name="weights being read", phase="load", device=device, nbytes=budget, how=how) for device in devices
    ]


def _by_device(items: Iterable[MemoryItem]) -> dict[str, int]:
    """The known bytes of `items` on each device."""
    found: dict[str, int] = {}
    for item in items:
        found[item.device] = found.get(item.device, 0) + (item.nbytes or 0)
    return found
