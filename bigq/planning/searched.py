"""search_weights: which weights have their scales searched, and how important each of their input features is."""

from collections.abc import Mapping

from torch import Tensor

from bigq.config import QuantizationConfig
from bigq.errors import ConfigError
from bigq.formats import Description, importance_of
from bigq.model.tree import ModelTree
from bigq.system.text import shortlist

__all__ = ["search_weights"]


def search_weights(
    described: Mapping[str, Description], tree: ModelTree, config: QuantizationConfig, rules: dict[str, str]
) -> dict[str, Tensor]:
    """The importance, float32 [K], of the input features of each weight whose scales `config` has searched.

    A weight without moments keeps absmax: with all features equally important, a search can make a model worse.

    Args:
        described: the weights that are quantized, by first name.
        rules: why weights are quantized, by module; what becomes of their scales is added.

    Raises:
        ConfigError: the config has no moments; or these have no entry for any weight, or one of another length.
    """
    able = {name: what for name, what in described.items() if config.method in what.format.methods}
    if config.method == "absmax" or not able:
        return {}
    moments = config.required_moments()
    names_of = {group.names[0]: group.names for group in tree.tensors}
    searched: dict[str, Tensor] = {}
    without: dict[str, list[str]] = {}  # leaves, by module
    misfits = []
    for name, description in able.items():
        entry = next((alias for alias in names_of[name] if alias in moments), None)
        if entry is None:
            owner, _, leaf = name.rpartition(".")
            without.setdefault(owner, []).append(leaf)
        elif len(moments[entry]) != description.shape[-1]:
            misfits.append(f"{entry} has {description.shape[-1]} input features and {len(moments[entry])} moments")
        else:
            searched[name] = importance_of(moments[entry])
    if misfits:
        raise ConfigError(f"the moments are those of another model: {shortlist(misfits)}")
    if not searched:
        raise ConfigError(
            f"the moments have no entry for any of the {len(able)} weights to search, such as {next(iter(able))}; "
            f"they have {shortlist(list(moments), 3) or 'none'}: measure the model under the names that it has here"
        )
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in able):
        lacking = ", ".join(without.get(owner, ()))
        rules[owner] += f"; absmax, because there are no moments: {lacking}" if lacking else "; scales searched"
    return searched
