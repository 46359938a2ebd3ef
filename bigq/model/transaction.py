"""transaction: a model is as it was if what changes it raises."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

__all__ = ["Snapshot", "restored_on_error"]


@contextmanager
def restored_on_error(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Give `modules` back what a `Snapshot` of them holds if the block raises, Ctrl-C included."""
    before = Snapshot(modules.values())
    try:
        yield
    except BaseException:
        before.restore()
        raise


class Snapshot:
    """The class, attributes and tensors of modules as they are, to put back; it keeps the tensors alive.

    It holds what a load changes: also requires_grad of the parameters, and the forward of a GraphModule's class, which
    accelerate replaces there.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [(module, module.__class__, {**vars(module)}) for module in dict.fromkeys(modules)]
        attributes = [attributes for _, _, attributes in self._modules]
        tables = [of[name] for of in attributes for name in ("_parameters", "_buffers")]
        self._tables = [(table, dict(table.items())) for table in tables]
        self._requires_grad = [
            (tensor, tensor.requires_grad) for _, held in self._tables for tensor in held.values() if tensor is not None
        ]
        kinds = {kind for _, kind, _ in self._modules if "GraphModuleImpl" in str(kind)}  # as accelerate tells them
        self._forwards = [(kind, vars(kind)["forward"]) for kind in kinds if "forward" in vars(kind)]
        # An RNN keeps a second list of its weights.
        of_rnns = [of for module, _, of in self._modules if isinstance(module, nn.RNNBase)]
        self._lists = [(held, [*held]) for of in of_rnns for held in of.values() if isinstance(held, list)]

    def restore(self) -> None:
        """Make the modules what they were; dicts and lists are the same objects again, with what they held."""
        for module, kind, attributes in self._modules:
            object.__setattr__(module, "__class__", kind)
            vars(module).clear()
            vars(module).update(attributes)
        for table, tensors in self._tables:
            if isinstance(table, dict):
                table.clear()
                table.update(tensors)
            else:  # a ScriptModule's, whose names are fixed
                for name, tensor in tensors.items():
                    table[name] = tensor
        for tensor, requires_grad in self._requires_grad:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        for graph_module, forward in self._forwards:
            graph_module.forward = forward
        for weights, held in self._lists:
            weights[:] = held
