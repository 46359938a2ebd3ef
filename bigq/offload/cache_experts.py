"""cache_experts: room on the GPU for the offloaded experts that were hit last, so that few of them cross the link."""

from bisect import bisect_right
from dataclasses import dataclass

from accelerate.utils import convert_file_size_to_int
from torch import nn

from bigq.errors import ConfigError, PlacementError, UnsupportedError
from bigq.offload.attach import hooks_of
from bigq.offload.block import OffloadedBlock
from bigq.offload.hooks import PlacementHook
from bigq.offload.prefetch import Prefetcher
from bigq.offload.space import is_file_backed
from bigq.system.internals import SEES_EDITS
from bigq.system.text import shortlist
from bigq.weight.expert_cache import ExpertCache
from bigq.weight.experts import QuantizedExperts

__all__ = ["cache_experts"]


def cache_experts(model: nn.Module, max_bytes: int | str) -> dict[str, int]:
    """Keep some experts of each offloaded layer on the GPU as well: those that were hit last.

    Without a cache, a call of a few tokens reads all experts that it hits in host memory. With one it reads those that
    the calls before it did not hit. Outputs keep their bits. The layers get equal shares of the memory.

    An earlier cache of the model is taken away first. CUDA graphs that were captured with it use memory that is freed:
    capture them again.

    Args:
        model: one that `load_and_quantize_model` returned, with experts in NF4 or FP4 that are stored on "cpu". Experts
            on "disk" have no cache.
        max_bytes: of the GPU's memory, or a string such as "4GiB"; 0 takes the cache away.

    Returns:
        {name of the module: how many of its experts have room}. Empty without a cache.

    Raises:
        ConfigError: `max_bytes` is no number of bytes.
        PlacementError: `max_bytes` is less than the experts of one token need, or a call is running.
        UnsupportedError: the model has no experts that are read in host memory, or some cannot be cached, and why.
        torch.OutOfMemoryError: `max_bytes` is more than the GPU has free. The model has no cache then.

    Example:
        >>> import bigq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> try:
        ...     bigq.cache_experts(model, "4GiB")
        ... except bigq.UnsupportedError as error:
        ...     print(error)
        Sequential has no offloaded experts: a device map has to store some on "cpu"
    """
    nbytes = _nbytes(max_bytes)
    layers = _layers(model)
    if nbytes and not layers:
        raise UnsupportedError(
            f'{type(model).__name__} has no offloaded experts: a device map has to store some on "cpu"'
        )
    running = [layer.name for layer in layers if layer.block.calls]
    if running:
        raise PlacementError(f"{shortlist(running)} is called now: change the cache of experts between calls")
    if nbytes and not SEES_EDITS:
        raise UnsupportedError(
            "this release of torch does not tell which experts were edited, so a cache cannot keep any"
        )
    cached = _cacheable(model, layers) if nbytes else []
    slots = _slots(cached, nbytes) if nbytes else []
    for layer in layers:
        layer.experts.drop_cache()
    made = [layer.make_cache(count) for layer, count in zip(cached, slots, strict=True)]
    for layer, cache in zip(cached, made, strict=True):
        layer.experts.expert_cache = cache
    for layer in cached:
        layer.prefetcher.read_anew(layer.block)
    for cache in made:
        cache.empty()  # now, as a CUDA graph that is captured cannot hold it
    return {layer.name: count for layer, count in zip(cached, slots, strict=True)}


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Offloaded experts, the block that they are part of, and what brings it to its device."""

    name: str
    experts: QuantizedExperts
    block: OffloadedBlock
    prefetcher: Prefetcher

    def make_cache(self, slots: int) -> ExpertCache:
        specs, shared = self.experts.cached_specs(slots)
        size = self.experts.stack_size
        return ExpertCache(specs, shared, experts=size, slots=slots, device=self.prefetcher.device)

    def cache_nbytes(self, slots: int) -> int:
        return ExpertCache.nbytes_of(self.experts.cached_specs(slots)[0], slots)

    def most_slots(self, nbytes: int) -> int:
        """How many experts a cache of `nbytes` bytes holds, up to all of them."""
        size = self.experts.stack_size
        return bisect_right(range(size + 1), nbytes, key=self.cache_nbytes) - 1


def _layers(model: nn.Module) -> list[_Layer]:
    names = {module: name for name, module in model.named_modules()}
    hooks = [hook for module in names for hook in hooks_of(module) if isinstance(hook, PlacementHook)]
    return [
        _Layer(name=names[experts], experts=experts, block=hook.block, prefetcher=hook.prefetcher)
        for hook in hooks
        if hook.block is not None and hook.prefetcher is not None
        for experts in hook.block.experts
        if experts in names
    ]


def _cacheable(model: nn.Module, layers: list[_Layer]) -> list[_Layer]:
    """The layers whose experts are read in host memory. Raises an UnsupportedError if others than those on disk are."""
    found: list[_Layer] = []
    refused: list[str] = []
    for layer in layers:
        why = layer.experts.why_not_cached(layer.prefetcher.device)
        if not why:
            names = layer.experts.cached_specs(1)[0]
            if layer.prefetcher.read_anew(layer.block).views_of(layer.experts, names) is not None:
                found.append(layer)
                continue
            if any(is_file_backed(tensor) for tensor in layer.experts.parameters(recurse=False)):
                continue
            why = f"{layer.prefetcher.device} does not read the memory that they are stored in"
        refused.append(f"{layer.name}: {why}")
    if refused:
        raise UnsupportedError(f"no cache for some experts of {type(model).__name__}: {shortlist(refused)}")
    if not found:
        raise UnsupportedError(
            f'all offloaded experts of {type(model).__name__} are stored on "disk": those on "cpu" can have a cache'
        )
    return found


def _slots(layers: list[_Layer], nbytes: int) -> list[int]:
    """How many experts of each layer have room in its share of `nbytes` bytes."""
    slots = [layer.most_slots(nbytes // len(layers)) for layer in layers]
    least = [layer.experts.rows_of_token or 1 for layer in layers]
    if any(count < few for count, few in zip(slots, least, strict=True)):
        needed = len(layers) * max(layer.cache_nbytes(few) for layer, few in zip(layers, least, strict=True))
        raise PlacementError(
            f"max_bytes is {nbytes:,} bytes for {len(layers)} layers with experts; expected {needed:,} bytes or more, "
            "which is room for the experts of one token"
        )
    return slots


def _nbytes(value: int | str) -> int:
    try:
        nbytes = convert_file_size_to_int(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"max_bytes is {value!r}; expected bytes, or a string such as '4GiB'") from error
    if type(nbytes) is not int or nbytes < 0:
        raise ConfigError(f"max_bytes is {value!r}; expected bytes, or a string such as '4GiB'")
    return nbytes
