"""load_and_quantize_model: open a checkpoint, plan, read and quantize, put the results into the model, attach hooks."""

import os
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short  # of a state dict
from typing import TYPE_CHECKING

import torch
from torch import nn

from bigq.config import QuantizationConfig
from bigq.errors import CheckpointError, ConfigError
from bigq.interop.bitsandbytes_configs import as_config, is_config
from bigq.interop.bitsandbytes_models import refuse_bitsandbytes
from bigq.loading.stream import Budget
from bigq.loading.timings import Timings
from bigq.loading.unload import is_loaded, unloaded
from bigq.model.in_place import ModelTensors
from bigq.model.tree import ModelTree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
from bigq.load_into_shards import load_into_shards
from bigq.load_source import LoadOptions, collector_paused, load_source, open_checkpoint

__all__ = ["load_and_quantize_model"]


def load_and_quantize_model(
    model: nn.Module,
    weights_location: str | os.PathLike[str] | None = None,
    quantization_config: QuantizationConfig | object | None = None,
    device_map: str | int | torch.device | Mapping[str, int | str | torch.device] | None = None,
    *,
    bnb_quantization_config: object | None = None,
    no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload: str | torch.dtype | None = None,
    skip_keys: str | list[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    read_threads: int | None = None,
    read_budget: int | None = None,
    mesh: "DeviceMesh | None" = None,
    shard: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Load a checkpoint into `model`, quantize its linears while they are read, and place it as `device_map` says.

    Everything is checked before anything is changed, and the model is changed only after every tensor has arrived. So a
    call that raises leaves the model as it was.

    Without `weights_location` the weights of the model itself are quantized, layer by layer. All checks still come
    first, including whether the model accepts hooks and attributes. An interrupt after that (Ctrl-C) leaves some
    layers quantized, because keeping the old weights would need memory for both.

    A model that was loaded before is loaded again: its old weights are replaced, and take memory until it is done.

    With `mesh`, all of its processes call this function, and each loads its part of every weight, with the bytes that
    the whole weight has there. An error in one of them is raised in all, and all models stay as they were.

    accelerate's order of the arguments (model, config, weights) works too.

    Args:
        model: any PyTorch model, on the meta device (`accelerate.init_empty_weights`) or with weights. It is changed.
        weights_location: a safetensors file; a state dict that torch.save wrote (.bin, .pt, .pth, .ckpt, .pth.tar or
            .pt.tar); an index (`*.index.json`); a folder with one of these, or with all shards of one; or, as a str
            that is no path, a Hub repo: `owner/name` or `owner/name/folder`, with `@revision` or without. The name of a
            file that is passed itself does not matter. Variants may be alone in a folder (`model.fp16.safetensors`,
            `model.safetensors.index.fp16.json`); pass the path of one that is beside other weights. None: the weights
            that the model holds.
        quantization_config: a QuantizationConfig, accelerate's BnbQuantizationConfig or transformers'
            BitsAndBytesConfig. None: load a checkpoint that was saved quantized.
        device_map: None (the current GPU, or the CPU if there is none), "auto", "balanced", "balanced_low_0",
            "sequential", a device, or {module or parameter name: device, GPU index, "cpu" or "disk"}.
        bnb_quantization_config: accelerate's name for `quantization_config`.
        no_split_module_classes: names of module classes that an automatic map keeps on one device. None: what the model
            declares as `_no_split_modules`.
        max_memory: {GPU index or "cpu": bytes, or a string such as "20GiB"} for an automatic map.
        offload_folder: folder for tensors on "disk". They are stored there in one unnamed file, which the operating
            system frees with the model. None: the folder for temporary files; an automatic map then uses no disk. With
            `mesh`, it is for frozen shards of modules that `shard` gives a `CPUOffloadPolicy(pin_memory=False)`, or of
            all modules without `shard`; each process has a file. None: such shards are in memory.
        offload: how weights on "cpu" or "disk" are stored; overrides `QuantizationConfig.offload`.
        skip_keys: names of keyword arguments that hooks do not move between devices, such as a KV cache.
        strict: refuse tensors that are missing from the checkpoint, and unexpected ones. False: ignore unexpected
            tensors, and keep the model's own tensor in place of a missing one if it has numbers.
        progress: show a progress bar on stderr. None: only on a terminal.
        read_threads: threads that read files. None: 12, or the cores that this process may use if they are fewer. The
            processes that torchrun starts on a machine share its cores.
        read_budget: bytes of host memory, and of GPU memory, for weights that are being read, in addition to the
            result. None: 768 MiB, or an eighth of the memory that this process may still use if that is less. The
            processes that torchrun starts on a machine share its memory.
        mesh: the processes that share the model: a DeviceMesh of one dimension, or of two (replicas, shards). It takes
            the place of `device_map` and `offload`: each process loads onto its current GPU, or onto the CPU if the
            mesh is one of CPUs. What `shard` gives a `CPUOffloadPolicy` is stored on the CPU, or in `offload_folder`.
        shard: with `mesh`, called with the model when its quantized modules are in place, on the meta device, while the
            checkpoint is read. It shards them by their first dimension, and may add an adapter before that. Calls of
            `fully_shard` do it. None: each repeated block is sharded with `fully_shard`, and then the rest of the
            model.

    Returns:
        `model` itself, in the same training mode; or the module that `shard` returned, if it did. `model` has new
        attributes: `quantization_report` (see QuantizationReport), `quantization_method` and `is_loaded_in_8bit`; and
        `hf_device_map`, if anything is offloaded or on another GPU.

    Raises:
        CheckpointError: a file is missing or damaged, its tensors do not fit the model, or a weight holds NaN or Inf.
        ConfigError: the config contradicts the model or the checkpoint; or `mesh` and `offload_folder` are given, and
            nothing would be stored in the folder.
        PlacementError: the device map does not fit the model or this machine, or there is too little memory.
        UnsupportedError: the model has no weight to quantize, or is quantized already and `weights_location` is None;
            or it is sharded, or `shard` has sharded it in a way that no rows can be loaded into.

    Example:
        >>> import tempfile
        >>> import bigq, safetensors.torch, torch
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> with torch.device("meta"):
        ...     skeleton = build()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file(build().state_dict(), f"{folder}/model.safetensors")
        ...     config = bigq.QuantizationConfig("nf4")
        ...     model = bigq.load_and_quantize_model(skeleton, folder, config, device_map="cpu", progress=False)
        >>> model[0].weight
        QuantizedWeight(format=nf4, block_size=64, double_quant=False, shape=[64, 64], torch.float32, cpu)
        >>> model[2]  # the output head is not quantized
        Linear(in_features=64, out_features=8, bias=True)
    """
    weights_location, config = _arguments(model, weights_location, quantization_config, bnb_quantization_config)
    options = LoadOptions(
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
        offload=offload,
        skip_keys=skip_keys,
        strict=strict,
        progress=progress,
        budget=Budget.of_machine(read_threads, read_budget),
    )
    tree = ModelTree(model)
    if mesh is not None:
        if weights_location is None:
            raise ConfigError("mesh is given and weights_location is not: a load into shards reads a checkpoint")
        for name, value in (("device_map", device_map), ("offload", offload), ("max_memory", max_memory)):
            if value is not None:
                raise ConfigError(f"{name} is {value!r} and mesh is given: each process loads onto its own device")
        return load_into_shards(tree, weights_location, config, mesh, shard, options)
    if shard is not None:
        raise ConfigError("shard is given and mesh is not: pass the mesh of the processes that share the model")
    if weights_location is None:
        refuse_bitsandbytes(tree)
        return load_source(tree, ModelTensors(model), None, config, device_map, options=options, timings=Timings())
    if not is_loaded(tree):
        return _load_checkpoint(tree, weights_location, config, device_map, options)
    with unloaded(tree):
        return _load_checkpoint(ModelTree(model), weights_location, config, device_map, options)


@collector_paused()
def _load_checkpoint(
    tree: ModelTree,
    weights_location: str | os.PathLike[str],
    config: QuantizationConfig | None,
    device_map: object,
    options: LoadOptions,
) -> nn.Module:
    timings = Timings()
    with timings.timed("plan"):
        source, extra_states = open_checkpoint(tree, weights_location, config, options)
    return load_source(tree, source, extra_states, config, device_map, options=options, timings=timings)


def _arguments(
    model: nn.Module, weights_location: object, quantization_config: object, bnb_quantization_config: object
) -> tuple[str | os.PathLike[str] | None, QuantizationConfig | None]:
    """The checkpoint and the config, from either order of the arguments and either name of the config."""
    if is_config(weights_location) and not is_config(quantization_config):
        weights_location, quantization_config = quantization_config, weights_location
    if quantization_config is not None and bnb_quantization_config is not None:
        raise ConfigError("both quantization_config and bnb_quantization_config are given: pass one")
    config = quantization_config if bnb_quantization_config is None else bnb_quantization_config
    if weights_location is not None and not isinstance(weights_location, (str, os.PathLike)):
        hint = "; load a state dict into the model, and pass None" if isinstance(weights_location, Mapping) else ""
        raise CheckpointError(f"weights_location is {short(weights_location)}; expected a path or a Hub repo id{hint}")
    return weights_location, None if config is None else as_config(config, model)
