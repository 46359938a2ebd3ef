"""dispatch: put hooks on the modules of a loaded model that need them, and on no others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bigq.errors import PlacementError
from bigq.model.selection import output_head
from bigq.model.tree import is_called, is_stack
from bigq.offload.attach import attach, refuse_moves
from bigq.offload.block import OffloadedBlock
from bigq.offload.hooks import Float32Hook, PlacementHook
from bigq.offload.prefetch import Prefetcher
from bigq.offload.space import is_file_backed
from bigq.planning.device_map import DeviceMap, ancestors, as_user_map, execution_device, is_gpu, place_of
from bigq.planning.plan import Plan
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["dispatch", "keep_float32_callable"]


@dataclass(kw_only=True)
class _Unit:
    """A module that gets one hook, and the tensors that its calls need."""

    module: nn.Module
    path: str
    tensors: list[tuple[nn.Module, str, Tensor, str]] = field(default_factory=list)  # owner, leaf, tensor, place


def dispatch(
    model: nn.Module, device_map: DeviceMap, *, skip_keys: str | list[str] | None = None, is_placed: bool = True
) -> None:
    """Hook a model whose tensors are where `device_map` says, so that it runs.

    A model on one device gets no hooks, and no `hf_device_map`, by which other libraries know one that is offloaded or
    on several devices: saving would warn, and PEFT look for its GPU. Otherwise the root moves inputs in and outputs
    back, each offloaded block has copies of its tensors while it runs, and with several GPUs each block moves its own
    inputs.

    Args:
        skip_keys: keyword arguments that are not moved (default: what the model's `_skip_keys_device_placement` says).
        is_placed: False if the tensors are not there yet, so that only the map tells which are offloaded.

    Raises:
        PlacementError: the model is a ScriptModule and needs hooks.
    """
    vars(model).pop("hf_device_map", None)
    runs_on = execution_device(device_map)
    gpus = {place for place in device_map.values() if is_gpu(place)}
    if len(set(device_map.values())) == 1 and "disk" not in device_map.values():
        return
    model.hf_device_map = as_user_map(device_map)  # type: ignore[assignment]
    if isinstance(model, torch.jit.ScriptModule):
        raise PlacementError("a ScriptModule cannot carry the hooks of a device_map: pass one device")
    if skip_keys is None:
        skip_keys = getattr(model, "_skip_keys_device_placement", None)
    hooks: dict[str, PlacementHook] = {"": PlacementHook(runs_on, io_same_device=True, skip_keys=skip_keys)}
    modules: dict[str, nn.Module] = {"": model}
    for unit in _units(model, device_map):
        own_gpus = [place for _, _, _, place in unit.tensors if place in gpus]
        device = torch.device(own_gpus[0]) if own_gpus else runs_on
        offloaded = [
            (owner, leaf)
            for owner, leaf, tensor, place in unit.tensors
            if (tensor.device != device or is_file_backed(tensor) if is_placed else place != str(device))
        ]
        if unit.path and (offloaded or len(gpus) > 1):
            hooks[unit.path] = PlacementHook(device, skip_keys=skip_keys)
            modules[unit.path] = unit.module
        if offloaded:
            hooks[unit.path].block = OffloadedBlock(offloaded, ahead=True)
    _share_prefetchers(hooks)
    for path, hook in reversed(hooks.items()):  # that of the root last: it is the outer one if a module gets both
        attach(modules[path], hook)
    blocks = [hook.block for hook in hooks.values() if hook.block is not None]
    if blocks:
        hooks[""].guard_state(model, blocks)
    refuse_moves(model)


def _share_prefetchers(hooks: Mapping[str, PlacementHook]) -> None:
    """One Prefetcher a device. A module around other blocks does not use the slots."""
    prefetchers: dict[torch.device, Prefetcher] = {}
    around = {ancestor for path, hook in hooks.items() if path and hook.block for ancestor in ancestors(path)}
    for path, hook in hooks.items():
        if hook.block is not None:
            if hook.device not in prefetchers:
                prefetchers[hook.device] = Prefetcher(hook.device)
            hook.block.ahead = path not in around
            hook.prefetcher = prefetchers[hook.device]
            hook.prefetcher.add(hook.block)


def keep_float32_callable(model: nn.Module, plan: Plan) -> None:
    """Hook the modules that are float32 by a rule of their own among half-precision ones, to cast what they are given.

    The hook goes on the outermost module all of whose floating parameters are float32 by such a rule, and that holds no
    quantized weight: T5's `wo` is float32, but the layer around it computes in half precision.
    """
    floating = [tensor for tensor in plan.tensors if tensor.spec.dtype.is_floating_point and not tensor.is_buffer]
    by_rule = {name for tensor in floating if tensor.is_float32_by_rule for name in tensor.names}
    if not by_rule or not any(tensor.spec.dtype in (torch.float16, torch.bfloat16) for tensor in floating):
        return
    _hook_float32(model, "", by_rule, output_head(model), set())


def _hook_float32(
    module: nn.Module, path: str, by_rule: set[str], head: nn.Module | None, seen: set[nn.Module]
) -> None:
    if module in seen:  # a module that is reached on two paths gets one hook
        return
    seen.add(module)
    prefix = f"{path}." if path else ""
    own = [prefix + name for name, tensor in module.named_parameters() if tensor.is_floating_point()]
    is_float32 = path and own and is_called(module) and by_rule.issuperset(own)
    if is_float32 and not any(isinstance(inner, QuantizedModule) for inner in module.modules()):
        attach(module, Float32Hook(restore=module is not head))
        return
    for name, child in module.named_children():
        _hook_float32(child, prefix + name, by_rule, head, seen)


def _units(model: nn.Module, device_map: DeviceMap) -> list[_Unit]:
    """The modules to hook: blocks, and callers of tensors that lie outside of every block."""
    walk = _Walk(model, device_map)
    walk.visit(model, "", "", None, None)
    return list(walk.units.values())


class _Walk:
    """Collects the tensors of a model by the module whose calls need them."""

    def __init__(self, model: nn.Module, device_map: DeviceMap) -> None:
        self.model, self.device_map = model, device_map
        self.units: dict[str, _Unit] = {}
        self._split = {ancestor for name in device_map if name for ancestor in ancestors(name)}
        self._seen: set[nn.Module] = set()

    def visit(self, module: nn.Module, path: str, caller: str, block: str | None, scripted: str | None) -> None:
        """Visit `module` at `path`, which `caller` calls, in `block` and in the ScriptModule at `scripted`, if any."""
        if module in self._seen:  # one that is reached on two paths gets one hook, or they would undo each other
            return
        self._seen.add(module)
        if is_called(module):
            caller = path
            if block is None and path and path not in self._split and not is_stack(module):
                block = path
        if scripted is None and isinstance(module, torch.jit.ScriptModule):
            scripted = path
        prefix = f"{path}." if path else ""
        host = caller if block is None else block
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is not None:
                    unit = self.units.setdefault(host, _Unit(module=self.model.get_submodule(host), path=host))
                    placed = module.weight_of(leaf) if isinstance(module, QuantizedModule) else leaf
                    place = place_of(self.device_map, prefix + placed) or "cpu"
                    if scripted is None:
                        unit.tensors.append((module, leaf, tensor, place))
                    else:  # a deepcopy knows the outermost ScriptModule again, and none of those in it
                        own = (prefix + leaf)[len(scripted) + 1 :] if scripted else prefix + leaf
                        unit.tensors.append((self.model.get_submodule(scripted), own, tensor, place))
        for name, child in module.named_children():
            self.visit(child, prefix + name, caller, block, scripted)
