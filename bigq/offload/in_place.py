"""InPlace: offloaded experts that kernels read in pinned memory, so that only those that are hit cross the link.

A GPU reads pinned memory by its address, at nearly the rate of a copy. The products of a few rows read the weights of
the experts of these rows and no others. So the ids of the experts stay on the GPU: the host waits for nothing, and a
CUDA graph may hold the call. A call that hits most experts copies all of them instead, ahead of use.
"""

import sys
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from bigq.offload.space import PinnedMap, mapping_of
from bigq.offload.transfer import Layout
from bigq.weight.experts import QuantizedExperts

__all__ = ["InPlace", "view_on"]


class InPlace:
    """What stands in the place of a block's tensors while its experts are read in pinned memory.

    Args:
        members: (owner, name) of each tensor.
        whole: what they hold. Experts in files are copied, as everything else is.
        device: that reads.
    """

    def __init__(self, members: Sequence[tuple[nn.Module, str]], whole: Layout, device: torch.device) -> None:
        self._views = [
            view_on(tensor, device) if isinstance(owner, QuantizedExperts) and name in owner._parameters else None
            for (owner, name), tensor in zip(members, whole.tensors, strict=True)
        ]
        self._owned: dict[QuantizedExperts, dict[str, Tensor | None]] = {}
        for (owner, name), view in zip(members, self._views, strict=True):
            if isinstance(owner, QuantizedExperts):
                self._owned.setdefault(owner, {})[name] = view
        for owner in self._owned:
            if owner.expert_cache is not None:
                owner.expert_cache.read_from(self.views_of(owner, owner.expert_cache.tensors))
        copied = [tensor for tensor, view in zip(whole.tensors, self._views, strict=True) if view is None]
        self.layout = Layout(copied) if len(copied) < len(members) else whole

    def views_of(self, owner: QuantizedExperts, names: Collection[str]) -> dict[str, Tensor] | None:
        """{name: view} of tensors of `owner`, if all of them are read in place."""
        found = {name: view for name in names if (view := self._owned.get(owner, {}).get(name)) is not None}
        return found if len(found) == len(names) else None

    def with_views(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """A tensor for each member: the views, and `copies` of what `layout` has."""
        rest = iter(copies)
        return [next(rest) if view is None else view for view in self._views]


def view_on(tensor: Tensor, device: torch.device) -> Tensor | None:
    """A tensor of `device` over the memory of `tensor`, which it keeps alive; None if that is no OffloadSpace's.

    An OffloadSpace waits for the device before its memory is freed; torch's own pinned memory would not.
    It is a frozen Parameter if `tensor` is a Parameter. None also for another GPU than the one that was current when
    the memory was pinned: torch takes the memory for that GPU's, and would copy all of it to the other one.
    """
    if device.type != "cuda" or sys.platform != "linux":  # elsewhere a GPU may know the memory by another address
        return None
    place = mapping_of(tensor)
    if place is None or not isinstance(place[0], PinnedMap) or not tensor.is_contiguous():
        return None
    if place[0].gpu != (torch.cuda.current_device() if device.index is None else device.index):
        return None
    with torch.inference_mode(False), torch.no_grad():
        view = torch.as_tensor(_Bytes(tensor), device=device).view(tensor.dtype).view(tensor.shape)
        return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view


class _Bytes:
    """The memory of a contiguous tensor, as torch takes the memory of other libraries for that of a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # keeps this memory also where `tensor.data` is replaced
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
