"""materialize: move the offloaded tensors of a model to the device that runs them, and remove its hooks."""

import torch
from torch import Tensor, nn

from bigq.errors import PlacementError
from bigq.model.transaction import restored_on_error
from bigq.offload.attach import detach, hooks_of
from bigq.offload.dispatch import dispatch
from bigq.offload.hooks import PlacementHook
from bigq.offload.space import read_stored
from bigq.planning.device_map import execution_device, is_offloaded, normalize_device_map
from bigq.system.machine import usable_memory_nbytes

__all__ = ["materialize"]


def materialize(model: nn.Module) -> nn.Module:
    """Move every offloaded tensor of `model` to where it runs, so that it needs no hooks, and can be moved or cast.

    A model on several GPUs keeps the hooks that move its inputs, and its `hf_device_map`.

    Args:
        model: one that `load_and_quantize_model` returned.

    Returns:
        `model` itself.

    Raises:
        PlacementError: `model` has no device map, or its tensors do not fit; nothing was moved.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not isinstance(device_map, dict):
        if getattr(model, "quantization_method", None) == "bigq":
            return model  # on one device
        raise PlacementError(
            f"{type(model).__name__} has no hf_device_map: it was not loaded by load_and_quantize_model"
        )
    places = normalize_device_map(device_map)
    runs_on = execution_device(places)
    hooked = {module: hooks_of(module) for module in model.modules() if hasattr(module, "_hf_hook")}
    placements = [hook for hooks in hooked.values() for hook in hooks if isinstance(hook, PlacementHook)]
    wanted: dict[int, tuple[Tensor, torch.device]] = {
        id(tensor): (tensor, hook.device) for hook in placements if hook.block for tensor in hook.block.tensors()
    }
    _refuse_what_does_not_fit(list(wanted.values()))
    moved = {
        key: nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        for key, (tensor, device) in wanted.items()
        for copy in [read_stored(tensor).to(device, copy=True)]
    }
    skip_keys = placements[0].skip_keys if placements else None
    with restored_on_error(dict(model.named_modules())):
        for hook in placements:
            if hook.block is not None:
                hook.block.assign([moved[id(tensor)] for tensor in hook.block.tensors()])
        for module in hooked:
            detach(module, (PlacementHook,))
        dispatch(
            model,
            {name: str(runs_on) if is_offloaded(place, runs_on) else place for name, place in places.items()},
            skip_keys=skip_keys,
        )
        model.is_loaded_in_8bit = True  # type: ignore[assignment]  # see load_and_quantize_model
    return model


def _refuse_what_does_not_fit(wanted: list[tuple[Tensor, torch.device]]) -> None:
    needed: dict[torch.device, int] = {}
    for tensor, device in wanted:
        needed[device] = needed.get(device, 0) + tensor.nbytes
    for device, nbytes in needed.items():
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        else:
            free = usable_memory_nbytes()
        if nbytes > free:
            raise PlacementError(
                f"materialize needs {nbytes / 1e9:.3f} GB on {device}, which has {free / 1e9:.3f} GB free: "
                "free some memory there, or load with another device_map"
            )
