"""transformers' tensor and expert parallelism: the plan of a model is carried out after its weights are quantized.

`from_pretrained(..., distributed_config=DistributedConfig(tp_size=2))` makes a mesh and a plan: a style for each
module. transformers would shard the skeleton, and then read. Here each process reads and quantizes the whole model on
its device first, as rows have to be quantized whole. Then quantized modules get the styles of bigq, and all others
those of transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from bigq.errors import UnsupportedError
from bigq.integrations.expert_parallel import ExpertParallel
from bigq.integrations.tensor_parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["Distribution"]

_PLANS = "_resolve_parallel_plans"  # the method of a model that returns its three plans

_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "packed_colwise": lambda: ColwiseParallel(parts=2),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "moe_tp_experts": ExpertParallel,  # whole experts instead of a part of each: the sums are the same
    "ep_dispatch_experts": ExpertParallel,
}


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What `from_pretrained` would have done to the skeleton, kept until the weights are there.

    Args:
        step: the function of transformers that distributes a model: step(model, config, meshes).
        config: transformers' DistributedConfig.
        meshes: what transformers made of it.
        tp_plan: {name of a module or parameter: style} of tensor parallelism.
        ep_plan: the same of expert parallelism.
    """

    step: Callable[..., Any]
    config: Any
    meshes: Any
    tp_plan: dict[str, str]
    ep_plan: dict[str, str]

    @classmethod
    def of(cls, step: Callable[..., Any], model: Any, config: Any, meshes: Any) -> "Distribution":
        """What `config` asks for.

        Raises:
            UnsupportedError: it asks for FSDP, for pipelines, or for more processes for experts than for linears.
        """
        others = {name: getattr(config, name, None) or 1 for name in ("fsdp_size", "dp_replicate_size", "pp_size")}
        asked = [f"{name}={size}" for name, size in others.items() if size > 1]
        if asked:
            raise UnsupportedError(
                f"from_pretrained quantizes for tensor and expert parallelism, and DistributedConfig asks for "
                f"{', '.join(asked)}: load without it, and call fully_shard on the model"
            )
        if config.ep_size not in (1, config.tp_size):
            raise UnsupportedError(
                f"quantized experts are for processes that have the same tokens: ep_size={config.ep_size} with "
                f"tp_size={config.tp_size}; set ep_size={config.tp_size}"
            )
        tp_plan, ep_plan, _ = getattr(model, _PLANS)(config)
        return cls(step=step, config=config, meshes=meshes, tp_plan=tp_plan, ep_plan=ep_plan)

    def apply(self, model: Any) -> None:
        """Distribute `model`, whose weights are whole and quantized.

        Raises:
            UnsupportedError: a quantized module has a style that is none of linears or experts.
        """
        quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
        styles: dict[str, tuple[str, DeviceMesh]] = {}
        for plan, kind in ((self.tp_plan, "tp"), (self.ep_plan, "ep")):
            for name, style in plan.items():
                if name in quantized:
                    styles[name] = style, self.meshes.get_mesh(kind)
        unknown = {name: style for name, (style, _) in styles.items() if style not in _STYLES}
        if unknown:
            raise UnsupportedError(
                f"the plan of the model has styles for {len(unknown)} quantized modules that are none of "
                f"{sorted(_STYLES)}: {dict(list(unknown.items())[:3])}; name the modules in skip_modules"
            )
        held = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
        rest = {
            name: style
            for name, style in self.tp_plan.items()
            if name in held and name not in quantized and name.rpartition(".")[0] not in quantized
        }
        vars(model)[_PLANS] = lambda config: (rest, {}, {})
        try:
            self.step(model, self.config, self.meshes)
        finally:
            del vars(model)[_PLANS]
        model.tie_weights()
        for name, (style, mesh) in styles.items():
            parallelize_module(quantized[name], mesh, _STYLES[style]())
            vars(quantized[name])["_is_hooked"] = True  # as transformers marks what it has parallelized
