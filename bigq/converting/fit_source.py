"""fit_source: the formats that fit a budget best, measured on the float model of a folder or Hub repository."""

import os

import torch

from bigq.calibration.fit import check_budget, fit
from bigq.calibration.fit_result import Fit
from bigq.config import QuantizationConfig
from bigq.formats import NF4, Int8
from bigq.integrations.float_model import open_float_model
from bigq.planning.places import expected_device

__all__ = ["fit_source"]


def fit_source(
    source: str | os.PathLike[str],
    config: QuantizationConfig,
    *,
    max_bytes: int | str | None = None,
    bits: float | None = None,
    sensitivity: str = "kfac",
    device: str | int | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Fit:
    """Load the float model of `source`, and choose a format for every weight as `bigq.fit` does, from random token ids.

    The formats to choose among are that of `config`, int8, and keeping the weight. The float model has to fit into
    memory, with the activations of a forward and a backward pass. It is gone when this returns.

    Args:
        source: a folder with a config.json and weights, or a Hub repo.
        config: which weights are quantized, as in `bigq.fit`.
        max_bytes: bytes of the whole model, or a string such as "12GiB".
        bits: average bits of a weight; one of the two is given.
        sensitivity: as in `bigq.fit`: "kfac" needs a model that returns logits, "output" any.
        device: where the model runs. None: the current GPU, or the CPU if there is none.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: there is no such folder or repo, or it holds no model.
        ConfigError: as `bigq.fit`, and if the checkpoint is quantized.
        UnsupportedError: as `bigq.fit`, and if the library of the model refuses the files.
        PlacementError: as `bigq.fit`.
    """
    check_budget(max_bytes, bits)  # now, and not after the model is loaded
    model = open_float_model(source, expected_device(device), trust_remote_code=trust_remote_code)
    smallest = config.weight_format() or NF4()
    formats = [smallest, None] if isinstance(smallest, Int8) else [smallest, Int8(), None]
    return fit(model, max_bytes=max_bytes, bits=bits, config=config, formats=formats, sensitivity=sensitivity)
