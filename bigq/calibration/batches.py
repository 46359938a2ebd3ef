"""as_batches: the batches that a model is run on, the user's own or random token ids, on the device that it runs on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import ConfigError
from bigq.offload.containers import map_tensors

__all__ = ["Batch", "as_batches", "device_of"]

_ROWS, _TOKENS = 8, 256  # which channels of a model are large does not depend on the text: random ids show it too
_PROBE_TOKENS = 4
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len", "max_seq_length")


@dataclass(frozen=True, kw_only=True, eq=False)  # tensors have no one answer
class Batch:
    """The arguments of one call of a model: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        """Call `model` with the batch and return what it returns."""
        return model(*self.args, **self.kwargs)


def as_batches(
    model: nn.Module, batches: Iterable[object] | None = None, *, seed: int = 0, rows: int = _ROWS
) -> list[Batch]:
    """The batches to run `model` on, with their tensors on the device that the model runs on.

    Args:
        batches: each is a tensor, such as ids [B, T], which is the model's only argument; a mapping of keyword
            arguments, such as what a tokenizer returns; or a tuple or list of arguments. None: 8 rows of 256 random
            ids, fewer if the model is shorter, from the rows of the model's input embedding.
        seed: of the random ids. The same seed gives the same ids on every device.
        rows: of the 8 rows of random ids, as many are in one batch.

    Raises:
        ConfigError: `batches` is empty or no list of such batches; or it is None and the model does not take token ids
            alone, as a model of images does not.
    """
    device = device_of(model)
    if batches is None:
        return [_moved(batch, device) for batch in _random(model, seed, rows, device)]
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ConfigError(f"batches is {_what(batches)}; expected a list of batches, such as [ids]")
    found = [_moved(_batch(batch, place), device) for place, batch in enumerate(batches)]
    if not found:
        raise ConfigError("batches is empty; expected at least one batch, or None for random ids")
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device that `model` runs on: that of the hook on an offloaded model, or that of its first tensor."""
    hooked: object = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if isinstance(hooked, (torch.device, str, int)):
        return torch.device("cuda", hooked) if isinstance(hooked, int) else torch.device(hooked)
    tensors = (tensor for table in (model.parameters(), model.buffers()) for tensor in table if not tensor.is_meta)
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def _batch(value: object, place: int) -> Batch:
    if isinstance(value, Tensor):
        return Batch(args=(value,))
    if isinstance(value, Mapping):
        return Batch(kwargs={str(name): argument for name, argument in value.items()})
    if isinstance(value, (tuple, list)) and value and not isinstance(value[0], (int, float, str)):
        return Batch(args=tuple(value))
    raise ConfigError(
        f"batch {place} is {_what(value)}; expected a tensor, a mapping of keyword arguments, or a tuple of arguments"
    )


def _what(value: object) -> str:
    """A value as an error shows it: of a tensor its dtype and shape, because its numbers say nothing."""
    return f"a tensor {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else short(value)


def _moved(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors on `device`, those in lists, tuples and dicts too."""
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (batch.args, dict(batch.kwargs)))
    return Batch(args=args, kwargs=kwargs)


def _random(model: nn.Module, seed: int, rows: int, device: torch.device) -> list[Batch]:
    """Random ids of the model's vocabulary; an encoder-decoder gets them on both sides."""
    config = getattr(model, "config", None)
    both = getattr(config, "is_encoder_decoder", False) is True
    make = _for_both if both else _for_one
    vocabulary = _vocabulary(model, make, device)
    tokens = min([_TOKENS, *_lengths(model, config)])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (_ROWS, tokens), generator=generator, device="cpu")
    return [make(ids[start : start + rows]) for start in range(0, _ROWS, rows)]


def _for_one(ids: Tensor) -> Batch:
    return Batch(args=(ids,))


def _for_both(ids: Tensor) -> Batch:
    return Batch(kwargs={"input_ids": ids, "decoder_input_ids": ids.flip(1)})


def _lengths(model: nn.Module, config: object) -> list[int]:
    """The longest inputs that the model and its config say."""
    said = [getattr(owner, name, None) for owner in (config, model) for name in _LENGTHS]
    return [length for length in said if type(length) is int and length > 0]


class _FoundError(Exception):
    """Ends the forward of a model once the embedding that looks up its ids is known."""


def _vocabulary(model: nn.Module, make: Callable[[Tensor], Batch], device: torch.device) -> int:
    """How many ids the model knows: the rows of the embeddings that look the ids up.

    The model is called with a few zeros, and stopped where the last of these embeddings is reached: an encoder-decoder
    has two. Which module it is does not depend on its name then.
    """
    rows: list[int] = []
    batch = _moved(make(torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="cpu")), device)
    wanted = len(batch.args) + len(batch.kwargs)

    def look(module: nn.Embedding, args: tuple[Any, ...], output: object) -> None:
        ids = args[0] if args else None
        # Positions count up, so they are not these zeros.
        if isinstance(ids, Tensor) and ids.shape == (1, _PROBE_TOKENS) and not ids.any():
            rows.append(module.num_embeddings)
        if len(rows) == wanted:
            raise _FoundError

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(look) for module in embeddings]
    kind = type(model).__name__
    try:
        with torch.no_grad():
            batch.call(model)
    except _FoundError:
        pass
    except Exception as error:
        raise ConfigError(
            f"{kind} could not be called with token ids alone ({type(error).__name__}: {error}): "
            "pass batches=[...], each a tensor, a dict of keyword arguments or a tuple of arguments of the model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not rows:
        raise ConfigError(f"{kind} has no nn.Embedding that takes token ids: pass batches=[...] for it")
    return min(rows)
