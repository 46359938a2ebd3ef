"""shard_frozen: each process keeps some rows of the frozen weights, and a copy of what is trained, as DDP wants it.

FSDP2 gathers and drops each tensor of a block on its own, which takes milliseconds of host time a block, and shards
what is trained as well. A QLoRA step of few tokens waits for that.
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from bigq.errors import ConfigError, UnsupportedError
from bigq.formats import QUANT_STATE, state_name
from bigq.integrations.accelerate_ddp import UNITS, let_ddp_wrap
from bigq.integrations.gathered_units import GatheredUnits
from bigq.integrations.packed_units import Alike, CutWeight, Place
from bigq.interop.adapter_merges import watch_merges
from bigq.interop.frozen_weights import innermost, units_in
from bigq.model.repeated_blocks import repeated_blocks
from bigq.ops.sharding import is_sharded
from bigq.system.text import shortlist
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["reshard_frozen", "shard_frozen"]

SMALLEST = 1 << 16  # bytes of a tensor that is cut: to keep norms and biases whole costs less than to gather them
_LEAVES = (nn.Linear, nn.Embedding, QuantizedModule)


def shard_frozen(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave each process of `mesh` some rows of each frozen weight of `model`; wrap it in DDP then.

    Each repeated block, and each linear and embedding outside of blocks, gets its whole weights for the time in which
    it runs, forward and backward. The next one is gathered meanwhile. What is trained, and tensors of less than 64 KiB,
    stay whole. Outputs, gradients and the trained adapter have the bits of DDP without it.

    All processes call the model equally often, and merge adapters together. A write to a weight that is whole would be
    lost: call `reshard_frozen` in all of them before. A merge does so itself.

    Args:
        model: with the adapter, and with the same numbers in all processes. For `load_and_quantize_model(...,
            mesh=mesh, shard=...)`, the model that `shard` is called with: each process reads and quantizes its rows.
        mesh: of one dimension.

    Returns:
        `model`, changed.

    Raises:
        ConfigError: `mesh` has several dimensions, or `model` holds nothing frozen that could be cut.
        UnsupportedError: `model` has been sharded before.
    """
    if mesh.ndim != 1:
        raise ConfigError(f"mesh is {mesh}; expected one of one dimension, such as mesh['shards'] of this one")
    sharded = [name for name, own in model.named_parameters() if is_sharded(own)]
    if sharded or UNITS in vars(model):
        raise UnsupportedError(
            f"{len(sharded)} parameters of {type(model).__name__} are sharded already: {shortlist(sharded)}; "
            "call shard_frozen once, and neither before nor after fully_shard or parallelize_module"
        )
    units = list(_units(model))
    if not units:
        raise ConfigError(
            f"{type(model).__name__} has no frozen tensor of {SMALLEST} bytes or more in a block, a linear or an "
            "embedding; expected a quantized model with an adapter"
        )
    gathered, module_names = GatheredUnits(model, mesh), {module: name for name, module in model.named_modules()}
    alike: Alike = {}
    for modules, tensors in units:
        gathered.add(module_names[modules[0]], modules, [CutWeight.of(places, mesh, alike) for places in tensors])
    names = [name for name, own in model.named_parameters(remove_duplicate=False) if is_sharded(own)]
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    # DDP would send those of the first process to all.
    vars(model)["_ddp_params_and_buffers_to_ignore"] = [*ignored, *names]
    vars(model)[UNITS] = gathered
    watch_merges(model)
    let_ddp_wrap()
    return model


def reshard_frozen(model: nn.Module) -> None:
    """Let the shards stand in all modules of `model` again; after a call, some hold whole weights.

    Args:
        model: that `shard_frozen` was called with, or one that holds it or a part of it, such as that of DDP.

    Raises:
        ConfigError: `model` holds no weights in frozen shards.
    """
    found = units_in(model)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} holds no weights in frozen shards; expected the model that shard_frozen was "
            "called with, or one that holds it"
        )
    for gathered in found:
        gathered.put_back()


def _units(model: nn.Module) -> Iterator[tuple[list[nn.Module], list[list[Place]]]]:
    """Modules that are called, and all places of each tensor to cut that they alone hold, in the order of `model`."""
    blocks = set(repeated_blocks(model))
    inside = {module for block in blocks for module in block.modules()}
    callers = [
        module
        for module in model.modules()
        if module in blocks or (module not in inside and isinstance(module, _LEAVES))
    ]
    held = {caller: _large_frozen(caller) for caller in callers}
    layers: dict[nn.Module, list[nn.Module]] = {}  # around leaves, and may read their weights without a call of them
    for module in model.modules():
        if innermost(module) is not module:
            layers.setdefault(innermost(module), []).append(module)
    holders: dict[int, list[nn.Module]] = {}
    for caller, tensors in held.items():
        for key in tensors:
            holders.setdefault(key, []).append(caller)
    done: set[int] = set()
    for tensors in held.values():
        # What several blocks share stays whole, because a gather for one of them may not replace it in another.
        own = [key for key in tensors if key not in done and not (len(holders[key]) > 1 and inside & {*holders[key]})]
        done.update(own)
        if own:
            together = dict.fromkeys(caller for key in own for caller in holders[key])
            around = [layer for caller in together for layer in layers.get(caller, ())]
            yield (
                [*together, *around],
                [[place for caller in holders[key] for place in held[caller][key]] for key in own],
            )


def _large_frozen(caller: nn.Module) -> dict[int, list[Place]]:
    """{id of a tensor: its places} of the tensors in `caller` that are to be cut."""
    places: dict[int, list[Place]] = {}
    for module in caller.modules():
        for names in _together(module):
            held = {name: own for name in names if (own := module._parameters.get(name)) is not None}
            if sum(own.numel() * own.itemsize for own in held.values() if not own.requires_grad) >= SMALLEST:
                for name, own in held.items():
                    if not own.requires_grad and own.dim():
                        places.setdefault(id(own), []).append((module, name))
    return places


def _together(module: nn.Module) -> list[list[str]]:
    """Names of parameters of `module` that are cut together: the parts of a quantized weight, or one of another."""
    parts: list[list[str]] = []
    if isinstance(module, QuantizedModule):
        parts = [
            [state_name(leaf, part) for part in description.state_spec]
            for leaf, description in module.descriptions.items()
        ]
    taken = {QUANT_STATE, *(name for names in parts for name in names)}
    return [*parts, *([name] for name in module._parameters if name not in taken)]
