"""QuantizedModule: a module with quantized weights. Its attribute `weight` still reads and writes the weight.

The parts of the weight `leaf` are frozen Parameters of the module: "leaf_packed", "leaf_absmax" and so on. They are no
buffers, because frameworks shard, offload and count Parameters. Reading `module.leaf` gives a QuantizedWeight.
Assigning a tensor to it, or writing to it in place, quantizes the new numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import local
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from bigq.errors import BigqError, CheckpointError, ConfigError, UnsupportedError
from bigq.formats import (
    QUANT_STATE,
    Description,
    State,
    TensorSpec,
    decode_quant_state,
    encode_quant_state,
    quant_state_spec,
    state_name,
)
from bigq.ops.sharding import is_sharded, local_part, placed_like, register_rules
from bigq.system.distributed.internals import is_flattened_by_fsdp1
from bigq.system.internals import is_in_backward
from bigq.weight.lazy_weight import plain
from bigq.weight.placeholder import is_placeholder
from bigq.weight.quantized_weight import QuantizedWeight
from bigq.weight.stored import Stored

__all__ = ["QuantizedModule", "weight_property"]

_CALLS = local()  # `changed`: what weights are read as in the calls that this thread runs


def weight_property(leaf: str) -> Any:
    """Make the property `leaf` of a class of QuantizedModule, which reads and writes that quantized weight."""

    def read(module: "QuantizedModule") -> Tensor:
        return module.read_weight(leaf)

    def write(module: "QuantizedModule", value: Tensor) -> None:
        module.assign_weight(leaf, value)

    return property(read, write, doc=f"The quantized weight {leaf!r}, as a QuantizedWeight.")


class QuantizedModule(nn.Module):
    """Base class of all modules with quantized weights. `load_and_quantize_model` changes the class of a module to it.

    The new class is a subclass of both this one and the module's own class. `QuantizedLinear` is that of nn.Linear.

    Example:
        >>> import bigq, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 64), torch.nn.Linear(64, 64))
        >>> config = bigq.QuantizationConfig("int8", also_quantize=["0"])
        >>> embedding = bigq.load_and_quantize_model(model, None, config, device_map="cpu")[0]
        >>> [name for name, _ in embedding.named_parameters()]
        ['weight_packed', 'weight_absmax', 'quant_state']
    """

    _quantized: dict[str, Description]
    _was_changed: bool
    _is_gathered: bool = False  # torch sets the tensors by setattr, when it gathers shards and when it drops the whole

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Keep the class of a module out of the registries of the user's classes, which may ask for arguments, too."""

    @property
    def descriptions(self) -> dict[str, Description]:
        """{leaf: description} of the quantized weights, as a copy."""
        return dict(self._quantized)

    def state_spec(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the parts of all quantized weights and of quant_state, by the name of the Parameter."""
        spec = {
            state_name(leaf, part): part_spec
            for leaf, description in self._quantized.items()
            for part, part_spec in description.state_spec.items()
        }
        return {**spec, QUANT_STATE: quant_state_spec(len(self._quantized))}

    def weight_of(self, name: str) -> str:
        """The leaf that the Parameter `name` is a part of: the first one for quant_state, `name` if it is no part."""
        for leaf, description in self._quantized.items():
            if name == QUANT_STATE or name in [state_name(leaf, part) for part in description.state_spec]:
                return leaf
        return name

    def stored_weight(self, leaf: str) -> Stored:
        """The weight `leaf` as it is stored now."""
        description = self._quantized[leaf]
        state = {part: self._parameters[state_name(leaf, part)] for part in description.state_spec}
        if is_sharded(state["packed"]):
            register_rules()
        return Stored(
            format=description.format,
            state=state,  # type: ignore[arg-type]
            shape=description.shape,
            transposed=description.transposed,
            compute_dtype=description.compute_dtype,
        )

    def read_weight(self, leaf: str) -> Tensor:
        """Return the weight `leaf` as a QuantizedWeight, or dequantized while `torch.compile` traces."""
        if "_was_changed" in vars(self):
            changed = getattr(_CALLS, "changed", {})
            if (id(self), leaf) not in changed:
                self._refuse_late_read(leaf)
            elif changed[id(self), leaf] is not None:
                return cast(Tensor, changed[id(self), leaf]())
        stored, dtype = self.stored_weight(leaf), self._quantized[leaf].dtype
        if is_compiling():
            return stored.dequantize(dtype)
        return QuantizedWeight.of(stored, dtype, partial(self.write_weight, leaf))

    @contextmanager
    def changed(self, leaf: str, change: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        """In the context, reading the weight `leaf` gives what `change` makes of its numbers. None: the weight itself.

        It is for a forward that reads the weight, and changes no number that is stored. The result may have a gradient.
        It is computed once, and again if it was read without gradients before.
        """
        made: dict[tuple[bool, bool], Tensor] = {}
        with_gradients = torch.is_grad_enabled()

        def make() -> Tensor:
            assert change is not None
            return change(self.stored_weight(leaf).dequantize(self._quantized[leaf].dtype))

        def read() -> Tensor:
            if is_compiling():  # equal nodes are one in a graph
                return make()
            mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            if with_gradients and not mode[0]:
                vars(self)["_was_read_without_gradients"] = True
            if mode not in made:
                made[mode] = make()
            return made[mode]

        before = getattr(_CALLS, "changed", {})
        _CALLS.changed = {**before, (id(self), leaf): None if change is None else read}
        vars(self).update(_was_changed=True)  # modules without changes need not look for them
        vars(self).pop("_was_read_without_gradients", None)
        try:
            yield
        finally:
            _CALLS.changed = before

    def _refuse_late_read(self, leaf: str) -> None:
        """Raise an UnsupportedError if a part of a call is computed again after the call, and reads the weight `leaf`.

        What the call was told to change would be missing in that part, and gradients would be wrong.
        """
        if is_compiling():
            return
        is_late = is_in_backward()
        if is_late is None:
            is_late = torch.is_grad_enabled() and "_was_read_without_gradients" in vars(self)
        if is_late:
            raise UnsupportedError(
                f"the backward pass reads the quantized {leaf!r} of {type(self).__name__} without the adapter that its "
                "forward pass had: activation checkpointing inside the forward of this module computes again when the "
                "adapter is not there; put the checkpoint around a module that holds this one"
            )

    @property
    def was_changed(self) -> bool:
        """Whether a call with `changed` weights came before."""
        return "_was_changed" in vars(self)

    def forget_changes(self) -> None:
        """Take the module as one whose weights were never `changed`."""
        vars(self).pop("_was_changed", None)

    def assign_weight(self, leaf: str, value: Tensor) -> None:
        """`module.leaf = value`: quantize `value` into new Parameters.

        If `value` is the QuantizedWeight of another module, of the same format and shape, this module gets the
        Parameters of that module: the weights are tied. A copy of it (`.half()`, `.clone()`) is not tied.

        Args:
            leaf: name of a quantized weight.
            value: float numbers of its shape, or a QuantizedWeight. The weight takes over its dtype and its device.

        Raises:
            ConfigError: `value` has another shape, is not floating point, or holds NaN or Inf.
        """
        self._refuse_lost_write()
        is_copy = isinstance(value, QuantizedWeight) and value.is_copy
        for part, tensor in self._state_of(leaf, value).items():
            own = tensor.detach().clone() if is_copy else tensor
            is_parameter = isinstance(own, nn.Parameter)
            parameter = own if is_parameter else nn.Parameter(own.detach(), requires_grad=False)
            self._parameters[state_name(leaf, part)] = cast(nn.Parameter, parameter)
        self._redescribe({leaf: replace(self._quantized[leaf], dtype=value.dtype)})

    def write_weight(self, leaf: str, value: Tensor, *, follows: bool = False) -> None:
        """Quantize `value` into the existing Parameters of the weight `leaf`. Raises what `assign_weight` raises.

        With `follows`, the weight moves to the device of `value` and takes over its dtype.
        """
        self._refuse_lost_write()
        stored = self.stored_weight(leaf)
        with torch.no_grad():
            for part, tensor in self._state_of(leaf, value).items():
                own = stored.state[part]
                if follows and tensor.device != own.device:
                    own.data = tensor.detach()
                elif tensor is not own:
                    own.copy_(placed_like(tensor, own))
        if follows:
            self._redescribe({leaf: replace(self._quantized[leaf], dtype=value.dtype)})

    def _state_of(self, leaf: str, value: Tensor) -> State:
        """The state of `value` as the weight `leaf`; a QuantizedWeight stored in the same way keeps its state."""
        if not isinstance(value, Tensor):
            raise ConfigError(f"the quantized weight {leaf!r} is given {value!r}; expected a tensor")
        stored = self.stored_weight(leaf)
        if tuple(value.shape) != stored.weight_shape:
            raise ConfigError(
                f"the quantized weight {leaf!r} of shape {list(stored.weight_shape)} is given a tensor of shape "
                f"{list(value.shape)}"
            )
        operand = value.operand() if isinstance(value, QuantizedWeight) else None
        if operand is not None and (operand.format, operand.shape, operand.transposed) == (
            (stored.format, stored.shape, stored.transposed)
        ):
            return operand.state
        return stored.quantize(plain(value))

    def _redescribe(self, described: Mapping[str, Description]) -> None:
        """Set the descriptions {leaf: description}, and encode quant_state again if one has changed.

        A quant_state on meta, or in shards, is not changed.
        """
        changed = {leaf: description for leaf, description in described.items() if description != self._quantized[leaf]}
        for leaf, description in changed.items():
            self._describe(leaf, description)
        own = self._parameters.get(QUANT_STATE)
        if changed and own is not None and not own.is_meta and not is_sharded(own):
            own.data = encode_quant_state(self._quantized).to(own.device)

    def quantize_weight(self, leaf: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a float `weight` as the weight `leaf`: {name of the Parameter: tensor}. Changes nothing."""
        state = self.stored_weight(leaf).quantize(weight)
        return {state_name(leaf, part): tensor for part, tensor in state.items()}

    def _describe(self, leaf: str, description: Description) -> None:
        """Set the description of the weight `leaf`, without nn.Module's setattr, which takes 3 us an attribute."""
        vars(self)["_quantized"] = {**vars(self).get("_quantized", {}), leaf: description}

    def _forget(self) -> None:
        """Drop what `_describe` notes, before the module is none of this class any more."""
        del vars(self)["_quantized"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("_quantized", ()):  # nn.Module would register a Parameter of that name
            self.assign_weight(name, value)
            return
        if is_flattened_by_fsdp1(self, name):
            raise UnsupportedError(
                "FSDP1 (FullyShardedDataParallel) puts all parameters of a block into one floating-point tensor, and "
                f"those of {type(self).__name__} are integers: use FSDP2, which is fully_shard of "
                "torch.distributed.fsdp. With accelerate, set fsdp_version: 2 in fsdp_config, where 1 is the default; "
                "with transformers' Trainer, leave the 'version' of fsdp_config at 2"
            )
        own = vars(self).get("_parameters", {}).get(name)
        if own is not None and isinstance(value, nn.Parameter) and is_sharded(own) != is_sharded(value):
            vars(self)["_is_gathered"] = is_sharded(own)
            self._parameters[name] = value  # as FSDP2 itself does where a class has no __setattr__ of its own
        else:
            super().__setattr__(name, value)

    def _refuse_lost_write(self) -> None:
        """Raise an UnsupportedError while whole tensors stand in the places of shards, which come back."""
        if self._is_gathered:
            raise UnsupportedError(
                f"a weight of {type(self).__name__} is written while it is gathered for a call, and the write would be "
                "lost: call reshard() of the module that fully_shard was called with first, or reshard_frozen(model) "
                "of one that shard_frozen was called with"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedModule":
        """Move or cast the module. A cast changes no tensor of a weight, only the dtype that the weight reports."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtypes = {leaf: fn(torch.empty(0, dtype=own.dtype)).dtype for leaf, own in self._quantized.items()}
        floating = {leaf: dtype for leaf, dtype in dtypes.items() if dtype.is_floating_point}
        self._redescribe({leaf: replace(self._quantized[leaf], dtype=dtype) for leaf, dtype in floating.items()})
        return self

    def extra_repr(self) -> str:
        settings = [
            f"{leaf}: {', '.join(f'{name}={value}' for name, value in description.format.describe().items())}"
            for leaf, description in self._quantized.items()
        ]
        return ", ".join(filter(None, [super().extra_repr(), *settings]))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take quantized state, or quantize float weights. If anything does not fit, nothing is changed."""
        own = dict(state_dict)  # torch hands each module the part that is its own
        assigns = bool(local_metadata.get("assign_to_params_buffers"))
        try:
            if own and not assigns:
                self._refuse_lost_write()
            described = self._check_state(own, prefix, follows=assigns)
        except BigqError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._redescribe(described)

    def _check_state(self, state_dict: dict[str, Any], prefix: str, *, follows: bool) -> dict[str, Description]:
        """Check a state dict, and return the {leaf: description} that it leads to.

        Float weights in `state_dict` are replaced by their quantized state. With `follows`, a weight takes over their
        dtype.
        """
        quant_state = state_dict.get(prefix + QUANT_STATE)
        described = {} if quant_state is None else self._described(quant_state, prefix)
        unknown = described.keys() - self._quantized.keys()
        if unknown:
            raise CheckpointError(f"{prefix}{QUANT_STATE} describes {sorted(unknown)}, which are not quantized here")
        for leaf, own in self._quantized.items():
            spec = {prefix + state_name(leaf, part): part_spec for part, part_spec in own.state_spec.items()}
            held = [name for name in spec if name in state_dict]
            weight = state_dict.pop(prefix + leaf, None)
            if weight is None or is_placeholder(weight):
                self._check_parts(state_dict, prefix + leaf, spec, own, described.get(leaf))
                continue
            if held:
                raise CheckpointError(f"the state dict holds both {prefix + leaf} and {held[0]}: drop one of them")
            state_dict.update(self._quantized_floats(leaf, weight, prefix))
            described[leaf] = replace(own, dtype=weight.dtype) if follows else own
        return described

    @staticmethod
    def _check_parts(
        state_dict: dict[str, Any],
        weight: str,
        spec: dict[str, TensorSpec],
        own: Description,
        described: Description | None,
    ) -> None:
        """Raise a CheckpointError unless a state dict holds all parts of a weight, and they fit, or no part of it.

        A file that leaves out the duplicates of tied tensors may describe a weight and hold none of its parts.
        """
        held = [name for name in spec if name in state_dict]
        missing = [name for name in spec if name not in state_dict]
        if not held and described is None:
            return  # torch reports missing keys
        if missing and (held or described is None or described.format != own.format):
            raise CheckpointError(f"the state dict holds a part of the quantized {weight} and no {', '.join(missing)}")
        if described is None:
            raise CheckpointError(f"the state dict holds the quantized {weight} and no {QUANT_STATE} that describes it")
        if (described.shape, described.transposed, described.state_spec) != (own.shape, own.transposed, own.state_spec):
            raise CheckpointError(
                f"{weight}: the state dict holds {_words(described)}, the model {_words(own)}; "
                "load it with load_and_quantize_model into a newly built model"
            )
        for name in held:
            expected, found = spec[name], state_dict[name]
            if (tuple(found.shape), found.dtype) != (expected.shape, expected.dtype):
                raise CheckpointError(
                    f"{name}: expected {expected.dtype} {list(expected.shape)}, got {found.dtype} {list(found.shape)}"
                )

    def _quantized_floats(self, leaf: str, weight: Tensor, prefix: str) -> dict[str, Tensor]:
        """The entries of a state dict that replace the float `weight`."""
        expected = self._quantized[leaf].weight_shape
        if tuple(weight.shape) != expected:
            raise CheckpointError(f"{prefix}{leaf}: expected shape {list(expected)}, got {list(weight.shape)}")
        own = self._parameters[state_name(leaf, "packed")]
        if own is not None and not own.is_meta:  # with a weight on meta, torch reports whether it can be loaded
            weight = weight.to(own.device)
        state = {prefix + name: tensor for name, tensor in self.quantize_weight(leaf, plain(weight)).items()}
        return {**state, prefix + QUANT_STATE: encode_quant_state(self._quantized).to(weight.device)}

    def _described(self, quant_state: Tensor, prefix: str) -> dict[str, Description]:
        """The descriptions in the quant_state of a state dict, or the present ones if it is on meta or in shards."""
        own = self._parameters.get(QUANT_STATE)
        if quant_state.is_meta:
            return self.descriptions
        if is_sharded(quant_state):  # a shard of FSDP2 or tensor parallelism has to equal ours
            is_like_ours = own is not None and is_sharded(own) and not own.is_meta
            given = local_part(quant_state)  # on the CPU, where torch distributes a state that was gathered there
            if is_like_ours and not torch.equal(given, local_part(cast(Tensor, own)).to(given.device)):
                raise CheckpointError(f"{prefix}{QUANT_STATE} describes other weights than the sharded model holds")
            return self.descriptions
        return decode_quant_state(quant_state, f"{prefix}{QUANT_STATE} of the state dict")


def _words(description: Description) -> str:
    held = " transposed" if description.transposed else ""
    return f"{description.format.describe()} of shape {list(description.shape)}{held}"
