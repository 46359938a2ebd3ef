"""Stored: a weight as a format stores it, and the products that use the format's kernels."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bigq.errors import ConfigError, UnsupportedError
from bigq.formats import Format, Product, State
from bigq.ops import eager
from bigq.ops.sharding import is_cut_unevenly, is_sharded, local_part, placed_like, replicated_like, whole_of

__all__ = ["Stored", "multiply", "result_dtype"]


def multiply(
    x: Tensor,
    product: Product,
    tensors: tuple[Tensor | None, ...],
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """Compute x [..., K] times the transposed weight [N, K], plus bias [N], as a quantized linear does: [..., N].

    Args:
        x: activations, floating point.
        product: how the weight's format multiplies.
        tensors: what `product.parts` names: the parts of the weight, and the bias or None.
        compute_dtype: dtype of the product. None: the dtype of the result, which is that of autocast, or of x.

    Raises:
        UnsupportedError: x is not floating point, or its width is not K.
    """
    out_dtype, autocast = result_dtype(x)
    if x.is_nested:
        parts = [multiply(part, product, tensors, compute_dtype) for part in x.unbind()]
        return torch.nested.as_nested_tensor(parts, layout=x.layout)
    dtype = compute_dtype or out_dtype
    op, _, settings = product
    rows = x if x.dtype is dtype else x.to(dtype)  # `to` takes a microsecond even if it casts nothing
    if autocast:
        with torch.autocast(autocast, enabled=False):
            out = eager.linear(op, rows, tensors, settings)
    else:
        out = eager.linear(op, rows, tensors, settings)
    return out if out.dtype is out_dtype else out.to(out_dtype)


def result_dtype(x: Tensor) -> tuple[torch.dtype, str]:
    """The dtype of a product with x: that of autocast, or of x; and the device type of autocast, empty where it is off.

    Where it is on, it is turned off around the op, in which it would cast exact sums in float32 to its own dtype.
    """
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise UnsupportedError(
            f"a quantized weight is multiplied by activations of {dtype}; expected a floating dtype: cast them, or "
            "name the layer in skip_modules"
        )
    device_type = "cuda" if x.is_cuda else x.device.type  # `device.type` takes as long as all other lines here
    if torch.is_autocast_enabled(device_type) and dtype is not torch.float64:  # autocast does not cast float64
        return torch.get_autocast_dtype(device_type), device_type
    return dtype, ""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight, or a view of one, as a format stores it.

    Args:
        format: of the weight.
        state: its tensors, by part.
        shape: [..., N, K], as stored.
        transposed: whether the weight is [..., K, N].
        compute_dtype: dtype of products with it. None: the dtype of the activations.
    """

    format: Format
    state: State
    shape: tuple[int, ...]
    transposed: bool
    compute_dtype: torch.dtype | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode the weight, rounded once to `dtype`."""
        packed = self.state["packed"]
        if is_cut_unevenly(packed):
            part_format, state = self.format.select(self.state, self.shape, slice(None))  # its scales are not nested
            own = {part: local_part(placed_like(tensor, packed)) for part, tensor in state.items()}
            shape = (len(own["packed"]), *self.shape[1:])
            dense = whole_of(part_format.dequantize(own, shape, dtype), packed, self.shape)
        else:
            dense = self.format.dequantize(self.state, self.shape, dtype)
        return dense.mT if self.transposed else dense

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        """Quantize other numbers of the weight's shape, on their device, into a new state.

        Raises:
            ConfigError: `dense` is not floating point, or holds NaN or Inf.
        """
        if not dense.is_floating_point():
            raise ConfigError(f"a quantized weight is given {dense.dtype}; expected floating-point numbers")
        if not dense.is_meta and not dense.isfinite().all():
            raise ConfigError(f"a weight of shape {list(dense.shape)} that holds NaN or Inf cannot be quantized")
        rows = dense.detach().mT.contiguous() if self.transposed else dense.detach()
        rows = rows.float() if rows.dtype == torch.float64 else rows  # scales are float32
        return self._quantize_shards(rows) if is_cut_unevenly(rows) else self.format.quantize(rows)

    def _quantize_shards(self, rows: Tensor) -> dict[str, Tensor]:
        """`quantize` of a DTensor in uneven shards: each process quantizes its matrices, and scales are gathered."""
        row_format, shape = self.format.row_format, tuple(rows.shape)
        spec = row_format.state_spec(shape)
        own = row_format.quantize(local_part(rows))
        state = {part: whole_of(tensor, rows, spec[part].shape) for part, tensor in own.items()}
        if row_format == self.format:
            return state
        codes = torch.empty((rows.shape[:-1].numel(), state["packed"].shape[-1]), dtype=torch.uint8, device="meta")
        scales = state["absmax"].full_tensor().flatten(0, -2)  # type: ignore[attr-defined]
        finished = self.format.finish({"packed": codes, "absmax": scales}, shape)
        others = {part: replicated_like(tensor, rows) for part, tensor in finished.items() if part != "packed"}
        return {"packed": state["packed"], **others}

    def select(self, index: int | slice) -> "Stored | None":
        """An entry or a range of the first dimension as it is stored; None if it is not a range of stored rows."""
        if isinstance(index, int):
            if len(self.shape) < 3:
                return None
            shape = self.shape[1:]
        else:
            if index.step not in (None, 1) or (len(self.shape) < 3 and self.transposed):
                return None
            shape = (len(range(*index.indices(self.shape[0]))), *self.shape[1:])
        part_format, state = self.format.select(self.state, self.shape, index)
        return replace(self, format=part_format, state=state, shape=shape)

    def with_shape(self, shape: tuple[int, ...]) -> "Stored | None":
        """The same rows in other groups, as [E * N, K] is [E, N, K]; None if rows would be cut or are not stored."""
        if self.transposed or len(shape) < 2 or shape[-1] != self.shape[-1] or is_sharded(self.state["packed"]):
            return None
        spec = self.format.state_spec(shape)
        state = {part: held.view(spec[part].shape) for part, held in self.state.items()}
        return replace(self, state=state, shape=shape)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode only the entries `index` [...], all >= 0, of the first dimension: [..., *shape[1:]]."""
        row_format, state = self.format.take_rows(self.state, index.reshape(-1))
        dense = row_format.dequantize(state, (index.numel(), *self.shape[1:]), dtype)
        return dense.view(*index.shape, *self.shape[1:])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N]."""
        product = self.format.product(self.shape[-1])
        tensors = tuple(bias if part == "bias" else self.state[part] for part in product.parts)
        return multiply(x, product, tensors, self.compute_dtype)

    def batched_linear(self, x: Tensor) -> Tensor:
        """Compute x[e] [M, K] times the transposed weight e of [E, N, K], for each e: [E, M, N]."""
        weights, tokens = x.shape[:2]
        if not weights or not tokens:
            return x @ x.new_zeros(()).expand(weights, x.shape[-1], self.shape[-2])  # empty, and x gets a gradient
        if not self.format.has_stack_products:
            return torch.stack([self._entry(e).linear(rows) for e, rows in enumerate(x.unbind())])
        stops = torch.arange(tokens, weights * tokens + 1, tokens, dtype=torch.int32, device=x.device)
        if is_sharded(self.state["packed"]):
            stops = replicated_like(stops, self.state["packed"])
        return self.grouped_linear(x.flatten(0, 1), stops).view(weights, tokens, self.shape[-2])

    def grouped_linear(self, x: Tensor, stops: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute groups of rows of x [S, K], each times one transposed weight of [E, N, K], plus bias [E, N]: [S, N].

        Weight e multiplies the rows from `stops[e - 1]` (0 for the first) up to `stops[e]`. Rows after the last of
        `stops` give zeros. The host reads `stops` if the format has no products with stacks; then there is no bias.
        """
        if not self.format.has_stack_products:
            assert bias is None
            return self._one_by_one(x, stops.tolist())
        return self._stack_linear(x, stops.int(), bias, sorted_rows=True)

    def routed_linear(
        self, x: Tensor, ids: Tensor, bias: Tensor | None = None, *, weights: int | None = None
    ) -> Tensor:
        """Compute row i of [S, N]: row i // (S / M) of x [M, K] times the transposed weight ids[i], plus its bias.

        A row whose id is no weight's gives zeros. The format has products with stacks. `weights` says of how many
        weights these are a part, whose bits the rows are to have: see `Format.multiplies_rows_apart`.
        """
        return self._stack_linear(x, ids, bias, () if weights is None else (weights,), sorted_rows=False)

    def _stack_linear(
        self, x: Tensor, route: Tensor, bias: Tensor | None, more: tuple[int, ...] = (), *, sorted_rows: bool
    ) -> Tensor:
        product = self.format.stack_product(self.shape[-1], sorted_rows=sorted_rows)
        out_dtype, autocast = result_dtype(x)
        tensors = tuple(bias if part == "bias" else self.state[part] for part in product.parts)
        rows = x.to(self.compute_dtype or out_dtype)
        with torch.autocast(autocast, enabled=False) if autocast else nullcontext():
            return eager.routed(product.op, rows, route, tensors, (*product.settings, *more)).to(out_dtype)

    def _one_by_one(self, x: Tensor, stops: Sequence[int]) -> Tensor:
        starts = (0, *stops[:-1])
        groups = [(e, start, stop) for e, (start, stop) in enumerate(zip(starts, stops, strict=True)) if stop > start]
        parts = [self._entry(e).linear(x[start:stop]) for e, start, stop in groups]
        rest = len(x) - (stops[-1] if stops else 0)
        return torch.cat([*parts, x.new_zeros(rest, self.shape[-2], dtype=parts[0].dtype if parts else x.dtype)])

    def _entry(self, e: int) -> "Stored":
        entry = self.select(e)
        assert entry is not None
        return entry
