"""QuantizedExperts: transformers' fused experts, whose forward multiplies the rows of all experts in one launch.

transformers sorts the rows by expert for its own products, also those of one token. Here few rows are multiplied as
they come: a product finds the expert of each row by itself. In int8, and in bfloat16, no step reads a tensor on the
host. In 4 bits and float32, and for so many rows of float16 that the weights are dequantized, the host reads how many
rows each expert has.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from bigq.errors import UnsupportedError
from bigq.formats import TensorSpec, state_name
from bigq.ops.token_rows import Gate, gated, sort_rows, sum_rows, take_rows
from bigq.system.internals import calls_only_forward
from bigq.weight.expert_cache import ExpertCache, ExpertUse
from bigq.weight.low_rank import Changes
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.stored import result_dtype

__all__ = ["IMPLEMENTATIONS", "QuantizedExperts", "are_fused_experts"]

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")  # of transformers: the same sums in another order, as here
UNSORTED_SHARE = 4  # up to one row for each four experts, sorting takes longer than it saves

_GATES: WeakKeyDictionary[nn.Module, tuple[Any, Gate | None]] = WeakKeyDictionary()  # what was tried, and found


def are_fused_experts(kind: type[nn.Module]) -> bool:
    """Whether the forward of `kind` is that of transformers, which computes the products of experts in several ways.

    A class with a forward of its own, such as Step3p7Experts, may have the same methods and inherit the rest.
    """
    namespace = getattr(kind.forward, "__globals__", {})  # a wrapper has the name and module of what it wraps
    return namespace.get("__name__") == "transformers.integrations.moe"


class QuantizedExperts(QuantizedModule):
    """Fused experts with the products of a format that has them for stacks of weights.

    Where that does not hold, the forward is that of transformers: for another format, another `experts_implementation`
    than the ones that transformers takes by default, or weights that a parametrization changes.
    """

    num_experts: int
    has_gate: bool
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    expert_cache: ExpertCache | None = None  # of experts that are read in host memory

    def rows_of(self, x: Tensor) -> int | None:
        """How many rows a call with tokens x [..., H] multiplies, each by one expert, without reading other experts.

        None where that is not known, or where all experts are read: the forward is that of transformers, or the weights
        are dequantized.
        """
        top_k, leaves = self.rows_of_token, (self._up, "down_proj")
        if not (x.is_floating_point() and top_k is not None and self._multiplies(*leaves)):
            return None
        described = [self._quantized[leaf] for leaf in leaves]
        if not all(own.format.reads_hit_experts(own.shape[-1], own.compute_dtype or x.dtype) for own in described):
            return None
        return x.numel() // described[0].shape[-1] * top_k

    @property
    def stack_size(self) -> int:
        """How many experts the weights hold."""
        return self._quantized[self._up].shape[0]

    @property
    def rows_of_token(self) -> int | None:
        """How many experts a token has, if the config says it."""
        top_k = getattr(self.config, "num_experts_per_tok", None)
        return top_k if isinstance(top_k, int) else None

    def why_not_cached(self, device: torch.device) -> str:
        """Why products on `device` cannot take some experts from a cache; empty if they can."""
        top_k = self.rows_of_token
        if not self.multiplies:
            return "they are not computed by bigq's products: their format or experts_implementation has others"
        if top_k is None:
            return "the config has no num_experts_per_tok"
        for leaf in (self._up, "down_proj"):
            own = self._quantized[leaf]
            dtype = own.compute_dtype or own.dtype
            if not own.format.reads_hit_experts(own.shape[-1], dtype) or top_k > self.num_experts // 2:
                return f"{leaf} in {own.format} and {dtype} is not read in host memory for {top_k} experts a token"
            if not own.format.multiplies_rows_apart(own.shape, top_k, dtype, device):
                return f"the products of {leaf} sort the {top_k} rows of a token, so their order would change its bits"
            if own.format.parts_by_matrix(own.shape) is None:
                return f"two experts of {leaf} share second-level scales: load without double_quant"
        return ""

    def cached_specs(self, slots: int) -> tuple[dict[str, TensorSpec], list[str]]:
        """What a cache of `slots` experts holds, by the name of the Parameter, and the names that all experts share."""
        specs: dict[str, TensorSpec] = {}
        shared: list[str] = []
        for leaf in (self._up, "down_proj"):
            own, bias = self._quantized[leaf], self._parameters.get(f"{leaf}_bias")
            by_matrix = own.format.parts_by_matrix(own.shape) or {}
            of_slots = own.format.state_spec((slots, *own.shape[1:]))
            specs |= {state_name(leaf, part): of_slots[part] for part in by_matrix}
            shared += [state_name(leaf, part) for part, is_own in by_matrix.items() if not is_own]
            if bias is not None:
                specs[f"{leaf}_bias"] = TensorSpec(shape=(slots, *bias.shape[1:]), dtype=bias.dtype)
        return specs, shared

    def drop_cache(self) -> None:
        """Take `expert_cache` away, and leave no attribute to the class that dequantizing gives back."""
        vars(self).pop("expert_cache", None)

    def forward(self, *args: Any, changes: Changes | None = None, **kwargs: Any) -> Tensor:
        """Sum the experts of each row, weighted. The arguments are those of `_weighted_sum`, or of the class itself.

        Args:
            changes: what adapters add to the weights in this call.

        Raises:
            UnsupportedError: there are `changes`, and the forward is that of transformers.
        """
        if self._multiplies(self._up, "down_proj"):
            return self._weighted_sum(changes or {}, *args, **kwargs)
        if changes:
            raise UnsupportedError(
                f"{type(self).__name__} has adapters of PEFT, which are computed only with an experts_implementation "
                f"of {' or '.join(IMPLEMENTATIONS)} and in a format that has products for stacks; the model's is "
                f"{getattr(self.config, '_experts_implementation', None)!r}: call "
                "model.set_experts_implementation('grouped_mm')"
            )
        return cast(Tensor, super().forward(*args, **kwargs))  # some classes have other names for them

    @property
    def _up(self) -> str:
        """The name of the first weight."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def multiplies(self) -> bool:
        """Whether the forward is ours, and not that of transformers."""
        return self._multiplies(self._up, "down_proj")

    def adapts(self, leaf: str) -> bool:
        """Whether the forward takes `changes` of the weight `leaf`."""
        return leaf in (self._up, "down_proj") and self.multiplies

    def _weighted_sum(
        self, changes: Changes, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Sum the experts of each row of `hidden_states` [T, H], weighted.

        Args:
            changes: what adapters add to the weights.
            hidden_states: floating point.
            top_k_index: which experts a row has, [T, top_k]. One that does not exist adds nothing.
            top_k_weights: their weights, [T, top_k], or as many in another shape.

        Raises:
            UnsupportedError: rows, experts and weights are of different numbers of rows.
        """
        ids, tokens, top_k = top_k_index.reshape(-1), hidden_states.shape[0], top_k_index.shape[-1]
        if not ids.shape[0] == top_k_weights.numel() == tokens * top_k:
            raise UnsupportedError(
                f"{type(self).__name__} is given {list(hidden_states.shape)} rows, experts {list(top_k_index.shape)} "
                f"and weights {list(top_k_weights.shape)}; expected [T, H], [T, top_k] and [T, top_k]"
            )
        order = places = None
        if len(ids) <= max(top_k, self.num_experts // UNSORTED_SHARE):
            rows = self._experts(hidden_states, changes, ids, sorted_rows=False)
        else:
            order, places, stops = sort_rows(ids, self.num_experts)
            rows = self._experts(take_rows(hidden_states, order, places), changes, stops, sorted_rows=True)
        return sum_rows(rows, top_k_weights.reshape(tokens, top_k), order, places, hidden_states.dtype)

    def _experts(self, x: Tensor, changes: Changes, route: Tensor, *, sorted_rows: bool) -> Tensor:
        """The rows of all experts, each by its own: `route` says which, as the products of `Stored` take it."""
        cache = None if sorted_rows or is_compiling() else self.expert_cache
        use = None if cache is None else self._fetch(cache, x, route)
        try:
            return self._products(x, changes, route, use, sorted_rows=sorted_rows)
        finally:
            if use is not None:
                use.end()

    def _fetch(self, cache: ExpertCache, x: Tensor, ids: Tensor) -> ExpertUse | None:
        """The experts of `ids` in the slots of a cache, if products with them have the bits of those with all."""
        for leaf in (self._up, "down_proj"):
            own = self._quantized[leaf]
            dtype = own.compute_dtype or result_dtype(x)[0]
            if not own.format.multiplies_rows_apart(own.shape, len(ids), dtype, x.device):
                return None
        return cache.fetch(self._parameters, ids)

    def _products(
        self, x: Tensor, changes: Changes, route: Tensor, use: ExpertUse | None, *, sorted_rows: bool
    ) -> Tensor:
        for leaf in (self._up, "down_proj"):
            stored, bias = self.stored_weight(leaf), self._parameters.get(f"{leaf}_bias")
            if use is not None:
                weights, (slots, *_) = stored.shape[0], use.tensors[state_name(leaf, "packed")].shape
                state = {part: use.tensors[state_name(leaf, part)] for part in stored.state}
                stored = replace(stored, state=state, shape=(slots, *stored.shape[1:]))
                out = stored.routed_linear(x, use.slots, use.tensors.get(f"{leaf}_bias"), weights=weights)
            else:
                out = stored.grouped_linear(x, route, bias) if sorted_rows else stored.routed_linear(x, route, bias)
            for change in changes.get(leaf, ()):
                inputs = x.to(out.dtype)
                out = out + (change.grouped(inputs, route) if sorted_rows else change.routed(inputs, route))
            x = out
            if leaf != "down_proj":
                x = self._activated(x)
        return self.post_expert_norm(x) if getattr(self, "has_post_expert_norm", False) else x  # not before 5.18

    def _activated(self, x: Tensor) -> Tensor:
        """What transformers computes between the two products, in one kernel where it is one that is known here."""
        if not self.has_gate:
            return self.act_fn(x)
        gate = self._known_gate() if type(x) is Tensor and x.is_cuda and not is_compiling() else None
        return self._apply_gate(x) if gate is None else gated(x, gate)

    def _known_gate(self) -> Gate | None:
        """The gate that `_apply_gate` is, if it gives the same numbers for a few inputs; tried once for each module.

        It is tried again when a number of the module or of its activation has changed, whatever its name: it may be a
        limit. None if hooks hear the activation, which `_apply_gate` calls, or it has a forward of its own.
        """
        act_fn, method = getattr(self, "act_fn", None), self._apply_gate
        if isinstance(act_fn, nn.Module) and not calls_only_forward(act_fn):
            return None
        settings = getattr(method, "__func__", method), act_fn, _numbers(self), _numbers(act_fn)
        known = _GATES.get(self)
        if known is None or known[0] != settings:
            _GATES[self] = known = settings, _tried_gate(self, settings[0], act_fn)
        return known[1]

    def _multiplies(self, *leaves: str) -> bool:
        """Whether the products of stacks compute what the forward of transformers would."""
        described = self._quantized
        return (
            getattr(self.config, "_experts_implementation", None) in IMPLEMENTATIONS
            and "parametrizations" not in self._modules
            and all(leaf in described and described[leaf].format.has_stack_products for leaf in leaves)
        )


def _numbers(held_by: object) -> list[float]:
    """The numbers among the attributes of an object itself."""
    return [value for value in getattr(held_by, "__dict__", {}).values() if type(value) in (float, int, bool)]


def _tried_gate(experts: QuantizedExperts, function: Any, act_fn: Any) -> Gate | None:
    held = (*vars(experts).values(), *experts._buffers.values(), *getattr(act_fn, "parameters", tuple)())
    if any(isinstance(value, Tensor) for value in held):
        return None  # it may read tensors, whose numbers are not compared
    if "config" in getattr(getattr(function, "__code__", None), "co_names", ()):
        return None  # nor are those of the config
    gates = [Gate("silu")]
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if isinstance(alpha, float) and isinstance(limit, float):
        gates.append(Gate("clamped", alpha, limit))
    numbers = (torch.arange(128, device="cpu") * 37 % 128 - 64).float() / 5.0  # -12.8 to 12.6, in no order
    small = numbers.view(2, 64)
    x = torch.cat([small, 8 * small, 1e3 * small, 1e15 * small])  # a gate may clamp at any limit, under any name
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            got = experts._apply_gate(x)
        except Exception:  # it takes tensors of a GPU alone, or raises for those, too, when the forward calls it
            return None
        expected = [gated(x, gate) for gate in gates]
    is_like = [got.shape == out.shape and torch.allclose(got, out, rtol=1e-5, atol=1e-6) for out in expected]
    return next((gate for gate, is_it in zip(gates, is_like, strict=True) if is_it), None)
