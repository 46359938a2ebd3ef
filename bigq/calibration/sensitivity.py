"""sensitivities: how much worse a model gets if one of its weights is stored in a format.

For a weight W [N, K] that a format changes by d, with inputs x and gradients g of the outputs:

- "kfac": half of E[(g' d x)^2] over independent x and g, for each prediction of the model. It estimates the divergence
  (KL, in nats) of the model's distribution from the one it had. Martens and Grosse, arXiv 1503.05671, give the
  factors; here a sample of tokens takes the place of their matrices [K, K] and [N, N].
- "output": |d x|^2 / |W x|^2, the squared relative error of the outputs.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bigq.calibration.sampled_passes import Sampled
from bigq.calibration.token_sample import Tokens
from bigq.calibration.watched_products import WatchedWeight
from bigq.errors import ConfigError
from bigq.formats import Format, State
from bigq.planning.plan import PlannedWeight
from bigq.system.text import shortlist

__all__ = ["SENSITIVITIES", "sensitivities"]

SENSITIVITIES = ("kfac", "output")
_MOST = 1 << 26  # numbers of a weight that are decoded at a time: 256 MiB as float32


def sensitivities(
    weights: Sequence[WatchedWeight],
    plans: Sequence[Mapping[str, PlannedWeight]],
    sampled: Sampled,
    *,
    kind: str,
) -> dict[str, tuple[float, ...]]:
    """The sensitivity of each weight in each format, by the name of the weight.

    Args:
        weights: with their numbers, on any device. Each is quantized there, one at a time.
        plans: for each format {name of a weight: how it would be quantized}.
        sampled: what `sample_products` says of `weights`.
        kind: one of `SENSITIVITIES`; "kfac" needs gradients in `sampled`.

    Raises:
        ConfigError: a sensitivity is NaN or Inf, because a weight, an activation or a gradient is.
    """
    uses: dict[str, list[tuple[str, Tokens]]] = {}
    for use, tokens in sampled.tokens.items():
        uses.setdefault(use.name, []).append((use.kind, tokens))
    found: dict[str, tuple[float, ...]] = {}
    for weight in weights:
        matrix = weight.matrix.contiguous()
        errors = []
        for plan in plans:
            planned = plan[weight.name]
            weight_format, importance = planned.description.format, planned.importance
            importance = None if importance is None else importance.to(matrix.device)
            state = weight_format.quantize(matrix, method=planned.method, importance=importance)
            if kind == "kfac":
                error = sum(_divergence(matrix, weight_format, state, *use) for use in uses[weight.name])
                errors.append(error / (2 * sampled.predictions))
            else:
                errors.append(_output_error(matrix, weight_format, state, uses[weight.name]))
        found[weight.name] = tuple(errors)
    broken = [name for name, errors in found.items() if not torch.tensor(errors).isfinite().all()]
    if broken:
        raise ConfigError(
            f"the sensitivities of {len(broken)} weights are NaN or Inf: {shortlist(broken)}; a weight holds NaN or "
            "Inf, or the model cannot compute these batches in its dtype (float16 may overflow: load it in bfloat16)"
        )
    return found


def _divergence(matrix: Tensor, weight_format: Format, state: State, kind: str, tokens: Tokens) -> float:
    """The sum of E[(g' d x)^2] over all tokens that the weight multiplied in this use."""
    total, covered = 0.0, 0
    for member, seen in enumerate(tokens.seen.tolist()):
        inputs, gradients = tokens.of(member)
        if gradients is None or not len(inputs):
            continue
        pairs = torch.zeros((), device=matrix.device)
        for start, _, error in _changes(matrix, weight_format, state, member):
            pairs = pairs + _pairs(error, start, kind, inputs, gradients)
        total += seen * float(pairs.square().sum(dtype=torch.float64)) / (len(inputs) * len(gradients))
        covered += seen
    # Matrices of a stack that few tokens reach may have none in the sample: they are taken to be as the others.
    return total * int(tokens.seen.sum()) / covered if covered else 0.0


def _pairs(error: Tensor, start: int, kind: str, inputs: Tensor, gradients: Tensor) -> Tensor:
    """g' d x for each pair of a token's inputs and another's gradients, by rows `start` and following of d alone."""
    if kind == "rows":
        own = (inputs >= start) & (inputs < start + len(error))
        rows = error.new_zeros(len(inputs), error.shape[1])
        rows[own.to(error.device)] = error[(inputs[own] - start).to(error.device)]
        return rows @ _floats(gradients, error).mT
    across, along = (gradients, inputs) if kind == "outputs" else (inputs, gradients)  # N and K numbers a token
    across = _floats(across[:, start : start + len(error)], error)
    return (across @ error) @ _floats(along, error).mT


def _output_error(matrix: Tensor, weight_format: Format, state: State, uses: Sequence[tuple[str, Tokens]]) -> float:
    """|d x|^2 / |W x|^2 over all tokens of all uses."""
    changed, whole = 0.0, 0.0
    for kind, tokens in uses:
        for member, seen in enumerate(tokens.seen.tolist()):
            inputs, _ = tokens.of(member)
            if not len(inputs):
                continue
            parts = [
                (_outputs(error, start, kind, inputs), _outputs(values, start, kind, inputs))
                for start, values, error in _changes(matrix, weight_format, state, member)
            ]
            for change, values in [_summed(parts)] if kind == "inputs" else parts:
                changed += float(change.square().sum(dtype=torch.float64)) * seen / len(inputs)
                whole += float(values.square().sum(dtype=torch.float64)) * seen / len(inputs)
    return changed / whole if whole else 0.0


def _outputs(rows: Tensor, start: int, kind: str, inputs: Tensor) -> Tensor:
    """What some rows of a matrix compute from the inputs; of a sum over all rows ("inputs"), their share."""
    if kind == "outputs":
        return _floats(inputs, rows) @ rows.mT
    if kind == "inputs":
        return _floats(inputs[:, start : start + len(rows)], rows) @ rows
    own = (inputs >= start) & (inputs < start + len(rows))
    return rows[(inputs[own] - start).to(rows.device)]


def _summed(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    changes, values = zip(*parts, strict=True)
    return torch.stack(changes).sum(0), torch.stack(values).sum(0)


def _changes(matrix: Tensor, weight_format: Format, state: State, member: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first row, weight, what the format changes) of one matrix as float32, in ranges of its rows."""
    shape: tuple[int, ...] = tuple(matrix.shape)
    if matrix.dim() == 3:
        weight_format, state = weight_format.select(state, shape, member)
        matrix, shape = matrix[member], shape[1:]
    height = max(1, _MOST // max(1, shape[1]))
    if height >= shape[0]:
        values = matrix.float()
        yield 0, values, weight_format.dequantize(state, shape, torch.float32) - values
        return
    for start in range(0, shape[0], height):
        values = matrix[start : start + height].float()
        part_format, part = weight_format.select(state, shape, slice(start, start + height))
        yield start, values, part_format.dequantize(part, tuple(values.shape), torch.float32) - values


def _floats(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.to(like.device, torch.float32)
