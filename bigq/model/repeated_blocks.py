"""repeated_blocks: the modules of a model that are alike and run one after the other, such as decoder layers."""

from torch import nn

from bigq.model.tree import is_called, is_stack

__all__ = ["repeated_blocks"]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that are called and are members of a stack, or of a class that the model declares.

    A member of a stack (`is_stack`) counts if it holds modules itself. transformers' models declare classes in
    `_no_split_modules`.
    """
    declared = set(getattr(model, "_no_split_modules", None) or ())
    found: dict[nn.Module, None] = {}
    _visit(model, declared, found)
    return list(found)


def _visit(module: nn.Module, declared: set[str], found: dict[nn.Module, None]) -> None:
    in_stack = isinstance(module, (nn.ModuleList, nn.ModuleDict)) or (
        isinstance(module, nn.Sequential) and is_stack(module)
    )
    for child in module.children():
        is_member = in_stack and any(True for _ in child.children())
        if is_called(child) and (is_member or type(child).__name__ in declared):
            found[child] = None
        else:
            _visit(child, declared, found)
