"""transaction: restore a model if code that changes it raises."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from bigq.system.distributed.internals import forget_sharding
from bigq.system.internals import state_hooks
from bigq.system.interrupts import to_the_end

__all__ = ["Snapshot", "restored_on_error"]


class restored_on_error:  # noqa: N801 - a context manager, and no generator: it ends in few steps
    """Restore `modules` to what they are now if the `with` block raises, also by Ctrl-C.

    `from_shards` says that the block may shard or wrap them: see `Snapshot`. `undo` undoes, before that, what the block
    does elsewhere, and is safe to repeat. A manager of its own within this one would not do: an interrupt as the inner
    one is left would restore the modules alone.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], *, from_shards: bool = False, undo: Callable[[], None] | None = None
    ) -> None:
        self._before, self._undo = Snapshot(modules.values(), from_shards=from_shards), undo

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is not None:
            try:
                self._restore()
            except BaseException:  # also an interrupt as it is entered
                to_the_end(self._restore)
                raise

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
        self._before.restore()


class Snapshot:
    """The present class, attributes and tensors of modules, which `restore` puts back. It keeps the tensors alive.

    It holds everything that a load changes. That includes requires_grad of the parameters, and the forward of the class
    of a GraphModule, which accelerate replaces. With `from_shards` it also holds all dicts of the modules, such as
    those of their hooks and children, and torch forgets that it has sharded them. None of them is sharded now.
    """

    def __init__(self, modules: Iterable[nn.Module], *, from_shards: bool = False) -> None:
        self._modules = [(module, module.__class__, {**vars(module)}) for module in dict.fromkeys(modules)]
        attributes = [attributes for _, _, attributes in self._modules]
        tables = [of[name] for of in attributes for name in ("_parameters", "_buffers")]
        self._tables = [(table, dict(table.items())) for table in tables]
        self._requires_grad = [
            (tensor, tensor.requires_grad) for _, held in self._tables for tensor in held.values() if tensor is not None
        ]
        self._state_hooks = [(hooks, dict(hooks)) for module, _, _ in self._modules for hooks in state_hooks(module)]
        kinds = {kind for _, kind, _ in self._modules if "GraphModuleImpl" in str(kind)}  # accelerate's own test
        self._forwards = [(kind, vars(kind)["forward"]) for kind in kinds if "forward" in vars(kind)]
        self._from_shards = from_shards
        held = [value for _, _, own in self._modules for value in own.values()] if from_shards else []
        self._dicts = [(value, dict(value)) for value in held if isinstance(value, dict)]
        # An RNN keeps a second list of its weights.
        of_rnns = [of for module, _, of in self._modules if isinstance(module, nn.RNNBase)]
        self._lists = [(held, [*held]) for of in of_rnns for held in of.values() if isinstance(held, list)]

    def restore(self) -> None:
        """Put everything back. Dicts and lists are the same objects as before, with their old contents."""
        for module, kind, attributes in self._modules:
            object.__setattr__(module, "__class__", kind)
            vars(module).clear()
            vars(module).update(attributes)
            if self._from_shards:
                forget_sharding(module)
        for own, before in self._dicts:
            own.clear()
            own.update(before)
        for table, tensors in self._tables:
            if isinstance(table, dict):
                table.clear()
                table.update(tensors)
            else:  # of a ScriptModule, whose names are fixed
                for name, tensor in tensors.items():
                    table[name] = tensor
        for tensor, requires_grad in self._requires_grad:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        for hooks, registered in self._state_hooks:
            if hooks != registered:
                hooks.clear()
                hooks.update(registered)
        for graph_module, forward in self._forwards:
            graph_module.forward = forward
        for weights, held in self._lists:
            weights[:] = held
