"""QuantizedLinear: the one quantized module, an nn.Linear whose state is plain frozen Parameters."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedError
from bigq.formats import Description, Format, State, TensorSpec

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored in a `Format`.

    Its parameters are `weight` (packed codes), `absmax`, what else the format's `state_spec` names, `quant_state`
    (which describes them in a checkpoint), and `bias`. All but the bias are frozen and immune to `.half()`,
    `.to(dtype)` and their kin. They are Parameters, not buffers, because frameworks shard, offload and count those.

    Args:
        description: format, shape (N, K) and dtypes of the weight.
        bias: dtype of the bias, or None for no bias.
        device: where to make the uninitialized tensors.
    """

    format: Format
    source_dtype: torch.dtype
    compute_dtype: torch.dtype | None
    _hf_quantized_needs_local_tp = True  # transformers' tensor parallelism hands plain local shards to such a module

    def __init__(
        self, description: Description, *, bias: torch.dtype | None, device: torch.device | str = "meta"
    ) -> None:
        nn.Module.__init__(self)
        self._describe(description)
        for name, spec in description.state_spec.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.register_parameter("bias", nn.Parameter(torch.empty(self.out_features, dtype=bias, device=device)))

    @classmethod
    def convert(cls, linear: nn.Module, description: Description, state: State) -> None:
        """Turn `linear` into a QuantizedLinear where it stands; its bias stays.

        The object stays the same, so whatever else refers to it follows: a second parent, a closure, its own hooks.

        Args:
            linear: an nn.Linear or a GPT-2 Conv1D; changed.
            description: of the weight.
            state: the tensors of the quantized weight, as far as they are known yet.
        """
        parameters: dict[str, nn.Parameter | None] = dict.fromkeys(description.state_spec)
        for leaf, tensor in state.items():
            parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        parameters["bias"] = linear._parameters["bias"]
        object.__setattr__(linear, "__class__", cls)  # nn.Module's own takes 3 us, and a model may have 19,000 linears
        vars(linear)["_parameters"] = parameters
        cast(QuantizedLinear, linear)._describe(description)

    def _describe(self, description: Description) -> None:
        out_features, in_features = description.shape
        vars(self).update(  # not by nn.Module's setattr: 3 us an attribute
            out_features=out_features,
            in_features=in_features,
            format=description.format,
            source_dtype=description.dtype,
            compute_dtype=description.compute_dtype,
        )

    def state_spec(self) -> dict[str, TensorSpec]:
        """The named tensors of the quantized weight, by the name of their Parameter."""
        return self.description.state_spec

    @property
    def description(self) -> Description:
        """What the saved weight says of itself."""
        return Description(
            format=self.format,
            shape=(self.out_features, self.in_features),
            dtype=self.source_dtype,
            compute_dtype=self.compute_dtype,
        )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of `state_spec` for a float weight [N, K], on the weight's device; changes nothing."""
        return {**self.format.quantize(weight), "quant_state": self.description.encode().to(weight.device)}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] that this layer multiplies by, in `dtype` (by default that of the original weight)."""
        shape = (self.out_features, self.in_features)
        return self.format.dequantize(self._state, shape, dtype or self.source_dtype)

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - the name PEFT looks for before it calls dequantize()
        """The packed codes."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise UnsupportedError(
                f"QuantizedLinear got activations of {x.dtype}; expected a floating dtype. A parent module that casts "
                "its input to weight.dtype does this: name this layer in skip_modules"
            )
        out_dtype = x.dtype
        device_type = "cuda" if x.is_cuda else x.device.type  # the property costs as much as the rest of this method
        if torch.is_autocast_enabled(device_type) and out_dtype is not torch.float64:  # which autocast leaves alone
            out_dtype = torch.get_autocast_dtype(device_type)
        dtype = self.compute_dtype or out_dtype
        state: State = self._parameters  # type: ignore[assignment]
        # A cast that changes nothing takes a microsecond, and nn.Module's lookup of a Parameter half a one.
        out = self.format.linear(x if x.dtype is dtype else x.to(dtype), state, self._parameters["bias"])
        return out if out.dtype is out_dtype else out.to(out_dtype)

    @property
    def _state(self) -> State:
        return cast(State, self._parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move the quantized tensors like any other, but never cast them: a half-precision absmax is a wrong absmax."""
        frozen = {id(self._parameters[name]): self._parameters[name] for name in self.state_spec()}

        def move(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) in frozen and out.dtype != tensor.dtype:
                return tensor.to(out.device)
            return out

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def reset_parameters(self) -> None:
        """Do nothing: there is no such thing as a random quantized weight."""

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.format.describe().items())
        return f"{super().extra_repr()}, {settings}"
