"""model_card: the page of a quantized model on the Hub, with a table of its weights by layer."""

import re
from math import prod

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from bigq.errors import UnsupportedError
from bigq.footprint import num_parameters
from bigq.formats import dtype_name
from bigq.model.tree import ModelTree, find_owner, nbytes_of
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["model_card"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")  # that of a layer


def model_card(model: nn.Module, *, base_model: str | None = None) -> ModelCard:
    """Describe a quantized model for its page on the Hub: tags, and a table of the weights of each kind of layer.

    Args:
        model: one that `load_and_quantize_model` or `from_pretrained` returned. It is not changed.
        base_model: Hub repo id of the model that was quantized; the page then links to it.

    Returns:
        a card. `card.save("folder/README.md")` writes it, and `card.push_to_hub("owner/name")` uploads it.

    Raises:
        UnsupportedError: `model` holds no quantized weight.

    Example:
        >>> import bigq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> model = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4"), device_map="cpu")
        >>> print(bigq.model_card(model).text)
        <BLANKLINE>
        # Sequential, quantized to nf4
        <BLANKLINE>
        8,840 parameters in 7,712 bytes, 6.98 bits each. Quantized with bigq.
        <BLANKLINE>
        | weights | stored as | tensors | parameters | bytes |
        |---|---|---|---|---|
        | `*.weight` | nf4, block_size=64, double_quant=False | 2 | 8,192 | 5,120 |
        | `*.bias` | float32 | 3 | 136 | 544 |
        | `*.weight` | float32 | 1 | 512 | 2,048 |
        <BLANKLINE>
    """
    rows: dict[tuple[str, str], list[int]] = {}  # tensors, parameters, bytes
    formats: dict[str, None] = {}
    tree = ModelTree(model)
    for group in tree.tensors:
        if group.is_buffer or not group.persistent:
            continue
        module, leaf = find_owner(tree.modules, group.names[0])
        name, stored, count = group.names[0], dtype_name(group.tensor.dtype), group.tensor.numel()
        described = module.descriptions.get(module.weight_of(leaf)) if isinstance(module, QuantizedModule) else None
        if described is not None:
            settings = described.format.describe()
            kind = str(settings.pop("format"))
            formats[kind] = None
            weight = module.weight_of(leaf)  # type: ignore[operator]
            name = f"{name.removesuffix(leaf)}{weight}"
            stored = ", ".join([kind, *(f"{key}={value}" for key, value in settings.items())])
            count = prod(described.shape) if leaf == f"{weight}_packed" else 0
        row = rows.setdefault((_NUMBER.sub("*", name), stored), [0, 0, 0])
        row[0] += count > 0
        row[1] += count
        row[2] += nbytes_of(group.tensor)
    if not formats:
        raise UnsupportedError(f"{type(model).__name__} holds no quantized weight")
    nbytes, parameters = sum(row[2] for row in rows.values()), num_parameters(model)
    named = " and ".join(formats)
    data = ModelCardData(
        library_name="transformers" if hasattr(model, "hf_quantizer") else "bigq",
        tags=["bigq", *formats],
        base_model=base_model,
        base_model_relation=None if base_model is None else "quantized",
    )
    lines = [f"| `{name}` | {kind} | {n:,} | {count:,} | {size:,} |" for (name, kind), (n, count, size) in rows.items()]
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {type(model).__name__}, quantized to {named}\n\n"
        f"{parameters:,} parameters in {nbytes:,} bytes, {8 * nbytes / parameters:.2f} bits each. "
        "Quantized with bigq.\n\n"
        "| weights | stored as | tensors | parameters | bytes |\n|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
