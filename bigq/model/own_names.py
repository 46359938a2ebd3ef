"""own_names: a checkpoint under the names that the modules of a model give to the tensors of old files.

torch lets a module change a state dict before it is loaded: by a hook, or by `_load_from_state_dict`. Both are run on
tensors on meta, so only what they do to names is known: what they would compute is not.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigq.checkpoint import Renamed, Source
from bigq.model.transaction import Snapshot
from bigq.model.tree import ModelTree, is_dense, shape_of, tensor_name
from bigq.system.internals import load_hooks
from bigq.system.interrupts import to_the_end
from bigq.system.user_warnings import warn

__all__ = ["with_own_names"]

# Names that no module converts: LayerNorm's in files from TensorFlow, and weight norm's of torch 2.1 and later.
_OTHER_NAMES = [
    (re.compile(r"(?:^|(?<=\.))gamma$"), "weight"),
    (re.compile(r"(?:^|(?<=\.))beta$"), "bias"),
    (re.compile(r"parametrizations\.(\w+)\.original0$"), r"\1_g"),
    (re.compile(r"parametrizations\.(\w+)\.original1$"), r"\1_v"),
]
_OTHER_ENDS = ("gamma", "beta", "original0", "original1")


def with_own_names(tree: ModelTree, source: Source) -> Source:
    """`source` as the model of `tree` renames it, without what the model throws away; itself where that is nothing."""
    if source.in_place:
        return source
    expected = {name for group in tree.tensors for name in group.names}  # first: hooks give lazy parameters a shape
    names = _after_hooks(tree, source)
    others = [name for name in source.tensors if name.endswith(_OTHER_ENDS)]
    held = {names.get(name, name) for name in source.tensors} if others else set()
    for name in others:
        now = names.get(name, name)
        if now is None or now in expected:
            continue
        for pattern, other in _OTHER_NAMES:
            new = pattern.sub(other, now)
            if new != now and new in expected and new not in held:
                names[name] = new
    return Renamed(source, names) if names else source


def _after_hooks(tree: ModelTree, source: Source) -> dict[str, str | None]:
    """{name: new name, or None of what is thrown away} of the tensors of `source` that modules rename."""
    own = {kind for kind in set(map(type, tree.aliases)) if _overrides(kind)}
    asked = [(module, aliases) for module, aliases in tree.aliases.items() if type(module) in own or load_hooks(module)]
    if not asked:
        return {}
    stored = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in source.tensors.items()}
    names_of = {id(tensor): name for name, tensor in stored.items()}
    state = dict(stored)
    for module, aliases in asked:
        for alias in aliases:
            prefix = tensor_name(alias, "")
            before = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
            after = _loaded(module, before, prefix)
            kept = {name: tensor for name, tensor in after.items() if id(tensor) in names_of}
            if len(kept) < len(after):  # something is computed: what of is not known, so all of the old names stay
                held = {id(tensor) for tensor in kept.values()}
                kept |= {name: tensor for name, tensor in before.items() if id(tensor) not in held}
            state = {**{name: tensor for name, tensor in state.items() if name not in before}, **kept}
    new_names: dict[str, str | None] = dict.fromkeys(stored)
    new_names |= {names_of[id(tensor)]: name for name, tensor in state.items()}
    return {name: new for name, new in new_names.items() if new != name}


def _overrides(kind: type[nn.Module]) -> bool:
    """Whether a class loads a state dict in its own way. torch's own do not rename; batch norms add a count."""
    return kind._load_from_state_dict.__module__.partition(".")[0] not in ("torch", "bigq")


def _on_meta(tensor: Tensor) -> Tensor:
    if is_dense(tensor):
        return tensor.detach().to("meta")
    return torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")


def _loaded(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`state` as `module` changes it before it is loaded; `module` stays as it was."""
    changed, before = OrderedDict(state), Snapshot([module])
    try:
        if _overrides(type(module)):
            for table in ("_parameters", "_buffers"):  # what it copies goes into these
                own = vars(module)[table].items()
                vars(module)[table] = {leaf: None if t is None else _on_meta(t) for leaf, t in own}
            module._load_from_state_dict(changed, prefix, {}, True, [], [], [])
        else:
            for hook in load_hooks(module):
                hook(changed, prefix, {}, True, [], [], [])
    except Exception as error:  # it is the model's code, and may need numbers
        warn(
            f"{type(module).__name__} at {prefix!r} does not load tensors on meta ({error!r}): the names of the "
            "checkpoint are taken as they are",
        )
        return dict(state)
    finally:
        try:
            before.restore()
        except BaseException:  # also an interrupt as it is entered
            to_the_end(before.restore)
            raise
    return dict(changed)
