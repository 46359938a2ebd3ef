"""InputMoments: how large the inputs of each weight are, by which a search for scales weighs its errors."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, ConfigError
from bigq.system.text import shortlist

__all__ = ["InputMoments", "importance_of"]

_KIND = "bigq input moments"  # in the metadata of a file, as "kind"
_SMALLEST, _LARGEST = 1e-4, 1e4  # of an importance, whose mean is 1


class InputMoments(Mapping[str, Tensor]):
    """The mean of x_j^2 over tokens, for each input feature j of each weight: {name of the weight: float32 [K]}.

    `input_moments` measures them, and `QuantizationConfig(method="search", moments=...)` uses them. They take 4 bytes
    for each input feature of a linear, so they are a small file, and one file serves every format. They are not changed
    once they are made.

    Args:
        moments: {name of the weight in the model: floating point [K]}. They are copied to the CPU as float32.
        unreached: names of the weights whose inputs were not seen, so they have no moments: no batch reached their
            module, or their experts are quantized or multiply copies of their weights.

    Raises:
        ConfigError: a tensor is not floating point or has more dimensions, or holds a negative number, NaN or Inf.

    Example:
        >>> import bigq, torch
        >>> moments = bigq.InputMoments({"up.weight": torch.tensor([1.0, 4.0])})
        >>> moments
        InputMoments(1 weight)
        >>> moments["up.weight"]
        tensor([1., 4.])
    """

    def __init__(self, moments: Mapping[str, Tensor], *, unreached: Iterable[str] = ()) -> None:
        self._moments = {name: _checked(name, tensor) for name, tensor in moments.items()}
        self.unreached = tuple(unreached)

    def __getitem__(self, name: str) -> Tensor:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    __eq__ = object.__eq__  # a mapping would compare tensors
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        count = f"{len(self)} weight{'' if len(self) == 1 else 's'}"
        return f"InputMoments({count}{f', {len(self.unreached)} not reached' if self.unreached else ''})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to `path`, a safetensors file with a tensor of each weight's name.

        Raises:
            OSError: the file cannot be written.
        """
        metadata = {"kind": _KIND, "unreached": json.dumps(self.unreached)}
        try:
            save_file(self._moments, path, metadata)
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "InputMoments":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or `save` did not write it.
        """
        where = os.fspath(path)
        try:
            with safe_open(where, framework="pt") as file:
                metadata = file.metadata() or {}
                moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{where} cannot be read as input moments: {error}") from error
        if metadata.get("kind") != _KIND:
            raise CheckpointError(f"{where} holds no input moments; expected a file that InputMoments.save wrote")
        try:
            return cls(moments, unreached=json.loads(metadata.get("unreached", "[]")))
        except (TypeError, ValueError) as error:  # a ConfigError is a ValueError
            raise CheckpointError(f"{where} holds damaged input moments: {error}") from error


def importance_of(moments: Tensor) -> Tensor:
    """Moments [K] as the search weighs errors by them: float32 [K] on the CPU, of mean 1, within 1e-4 and 1e4.

    It is computed on the CPU, so that every device searches with the same bits.

    Raises:
        ConfigError: as for `InputMoments`.
    """
    exact = _checked("moments", moments).double()
    mean = exact.mean() if len(exact) else exact.sum()
    return (exact / mean.clamp_min(torch.finfo(torch.float64).tiny)).clamp(_SMALLEST, _LARGEST).float()


def _checked(name: str, tensor: Tensor) -> Tensor:
    """A copy of `tensor` as moments are kept."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != 1:
        found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ConfigError(f"{name}: moments are {found}; expected floating point [K], one for each input feature")
    copy = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    bad = (~copy.isfinite() | (copy < 0)).nonzero().flatten().tolist()
    if bad:
        raise ConfigError(
            f"{name}: moments are negative, NaN or Inf at {len(bad)} of {len(copy)} input features "
            f"({shortlist(bad)}); expected the mean of x^2 of each"
        )
    return copy
