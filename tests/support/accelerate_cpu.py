"""FSDP of accelerate between processes on the CPU, which it turns on for GPUs only. All else is accelerate's own."""

from functools import wraps

from accelerate.state import AcceleratorState, DistributedType, PartialState


def allow_fsdp_on_cpu():
    """From now on, in this process, an Accelerator with an FSDP plugin uses it."""
    original = AcceleratorState.__init__

    @wraps(original)
    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        known = AcceleratorState._shared_state != {}
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and not known:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp
