"""The quantized modules whose forward uses the kernels: linears, GPT-2's Conv1D, and embeddings."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from bigq.formats import QUANT_STATE, Description, Format, Product, encode_quant_state, state_name
from bigq.weight.fused_rows import FusedPart
from bigq.weight.quantized_module import QuantizedModule, weight_property
from bigq.weight.stored import multiply

__all__ = ["QuantizedConv1D", "QuantizedEmbedding", "QuantizedLinear", "QuantizedMatrix"]


class QuantizedMatrix(QuantizedModule):
    """A module that multiplies by its `weight` [N, K] and adds its `bias` [N], or None."""

    format: Format
    compute_dtype: torch.dtype | None
    _product: Product
    _tensor_names: tuple[str, ...]  # names of the Parameters that `_product` takes
    _fused: FusedPart | None = None  # of `fuse_linears`
    weight = weight_property("weight")

    @property
    def description(self) -> Description:
        """The format, shape and dtypes of the weight."""
        return self._quantized["weight"]

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a float weight [N, K] on its device: {name: tensor}, as in `state_spec`. Changes nothing."""
        state = self.quantize_weight("weight", weight)
        return {**state, QUANT_STATE: encode_quant_state(self._quantized).to(weight.device)}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight to a new tensor in `dtype` (None: the dtype of the weight)."""
        return self.stored_weight("weight").dequantize(dtype or self.description.dtype)

    @property
    def absmax(self) -> Tensor:
        """The scales of the weight, decoded: float32 [N, B], or [N, 1] for int8."""
        stored = self.stored_weight("weight")
        return stored.format.scales(stored.state)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., K] times the transposed weight, plus bias: [..., N], in x's dtype or in that of autocast.

        Raises:
            UnsupportedError: x is not floating point, or its width is not K.
        """
        product, tensors = self.operands()
        fused = self._fused
        if fused is not None:
            out = fused(tensors, x)
            if out is not None:
                return out
        return multiply(x, product, tensors, self.compute_dtype)

    def operands(self) -> tuple[Product, tuple[Tensor | None, ...]]:
        """How the format multiplies by the weight, and the Parameters that this takes, with the bias or None."""
        parameters = self._parameters  # nn.Module's own lookup of a Parameter takes half a microsecond
        return self._product, tuple([parameters[name] for name in self._tensor_names])

    def reset_parameters(self) -> None:
        """Do nothing: a quantized weight is never initialized at random."""

    def _describe(self, leaf: str, description: Description) -> None:
        super()._describe(leaf, description)
        if leaf == "weight":
            self.unfuse()  # the other linears are not changed
            product = description.format.product(description.shape[1])
            names = tuple(part if part == "bias" else state_name("weight", part) for part in product.parts)
            vars(self).update(
                format=description.format,
                compute_dtype=description.compute_dtype,
                _product=product,
                _tensor_names=names,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        super()._apply(fn, recurse)
        fused = self._fused
        if isinstance(fused, FusedPart) and not fused.is_intact(self.operands()[1]):
            self.unfuse()
        return self

    def unfuse(self) -> None:
        """Compute by itself again, as do all linears that it shares a launch with (`bigq.fuse_linears`)."""
        fused = vars(self).pop("_fused", None)
        if isinstance(fused, FusedPart):  # and not what `fuse_linears` records calls with
            fused.rows.release()

    def _forget(self) -> None:
        super()._forget()
        self.unfuse()
        for name in ("format", "compute_dtype", "_product", "_tensor_names"):
            vars(self).pop(name, None)

    def extra_repr(self) -> str:
        settings = [f"{name}={value}" for name, value in self.format.describe().items()]
        return ", ".join(filter(None, [super(QuantizedModule, self).extra_repr(), *settings]))


class QuantizedLinear(QuantizedMatrix, nn.Linear):
    """A linear layer whose weight is quantized: y = x W^T + b, computed by the kernels of a format.

    Its parameters are `weight_packed`, `weight_absmax`, all others that the format's `state_spec` names, `quant_state`
    (which describes them in a checkpoint), and `bias`. All but the bias are frozen and not floating point, so casting a
    model does not change them. `weight` reads and writes the weight itself, as a QuantizedWeight.

    Args:
        description: format, shape (N, K) and dtypes of the weight.
        bias: dtype of the bias, or None for no bias.
        device: where to make the tensors, which are uninitialized.

    Example:
        >>> import bigq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> linear = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4"), device_map="cpu")[0]
        >>> linear
        QuantizedLinear(in_features=64, out_features=32, bias=True, format=nf4, block_size=64, double_quant=False)
        >>> linear(torch.ones(2, 64)).shape
        torch.Size([2, 32])
        >>> linear.weight_packed.dtype, tuple(linear.weight_packed.shape)
        (torch.uint8, (32, 32))
    """

    _hf_quantized_needs_local_tp = True  # transformers' tensor parallelism passes plain local shards to such a module

    def __init__(
        self, description: Description, *, bias: torch.dtype | None, device: torch.device | str = "meta"
    ) -> None:
        nn.Module.__init__(self)
        self._describe("weight", description)
        for name, spec in self.state_spec().items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.register_parameter("bias", nn.Parameter(torch.empty(self.out_features, dtype=bias, device=device)))

    def _describe(self, leaf: str, description: Description) -> None:
        super()._describe(leaf, description)
        if leaf == "weight":
            out_features, in_features = description.shape
            vars(self).update(out_features=out_features, in_features=in_features)


class QuantizedConv1D(QuantizedMatrix):
    """GPT-2's Conv1D: a linear that holds its weight as [K, N]."""

    __repr__ = nn.Module.__repr__  # Conv1D's own shows no format


class QuantizedEmbedding(QuantizedModule):
    """An embedding that decodes only the rows that are looked up."""

    weight = weight_property("weight")

    def forward(self, input: Tensor) -> Tensor:
        """Decode the rows `input` [...] of the weight: [..., K], in the weight's dtype.

        Raises:
            UnsupportedError: `max_norm` was set, by which torch would change the weight.
        """
        if self.max_norm is not None:
            return cast(Tensor, super().forward(input))  # raises
        return self.stored_weight("weight").rows(input, self._quantized["weight"].dtype)
