"""own_attributes: what a module has under the names that its quantized class uses."""

from functools import cache

from torch import nn

from bigq.weight.quantized_module import QuantizedModule

__all__ = ["ADDED", "is_read_as_held", "name_in_use", "names_added"]


def is_read_as_held(module: nn.Module, leaf: str) -> bool:
    """Whether `module.leaf` is the Parameter `leaf` of `module`, or its None.

    It is not if the module holds the tensor elsewhere, as a buffer, or if a property or `__getattr__` of its class
    makes the tensor that is read.
    """
    held = module._parameters
    if leaf not in held:
        return False
    if leaf not in vars(module) and _is_looked_up(type(module), leaf):  # type: ignore[arg-type]
        return True
    try:
        return getattr(module, leaf) is held[leaf]
    except Exception:  # the user's own code
        return False


def names_added(base: type[QuantizedModule]) -> frozenset[str]:
    """The attributes of the class `base` of quantized modules, and of its objects, that an nn.Linear does not have."""
    kinds = [vars(kind) for kind in base.__mro__ if issubclass(kind, QuantizedModule)]
    names = {name for own in kinds for name in (*own, *own.get("__annotations__", ()))}
    return frozenset(name for name in names - {"weight"} if not (name.startswith("__") or hasattr(nn.Linear, name)))


ADDED = names_added(QuantizedModule)


def name_in_use(module: nn.Module, names: frozenset[str]) -> str | None:
    """The first of `names`, in their order, that `module` or its class already has."""
    own = vars(module)
    for table in (own, own["_parameters"], own["_buffers"], own["_modules"]):
        if not names.isdisjoint(table):
            return min(names.intersection(table))
    return _name_of_class(type(module), names)  # type: ignore[arg-type]


@cache
def _name_of_class(kind: type[nn.Module], names: frozenset[str]) -> str | None:
    return min((name for name in names if hasattr(kind, name)), default=None)


@cache
def _is_looked_up(kind: type[nn.Module], leaf: str) -> bool:
    """Whether torch alone looks the Parameters `leaf` of objects of the class `kind` up."""
    own = (nn.Module.__getattr__, object.__getattribute__)
    return (kind.__getattr__, kind.__getattribute__) == own and not hasattr(kind, leaf)
