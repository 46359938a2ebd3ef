"""check_format: it finds each way in which a format may break the contract."""

from dataclasses import dataclass

import pytest
import torch

from bigq.formats import Int8
from bigq.formats.base import Rows, TensorSpec
from bigq.testing import check_format


@dataclass(frozen=True, kw_only=True)
class _Named(Int8):
    """int8 under another name, which no registry knows."""

    @property
    def name(self):
        return "named"

    def describe(self):
        return {"format": "named", "threshold": self.threshold}


class _OneScaleForAll(_Named):
    def quantize_rows(self, rows, *, method="absmax", measured=None):
        padded = torch.cat([rows, rows.abs().amax().expand(len(rows), 1)], dim=1)  # the scale of every row
        found = super().quantize_rows(padded)
        return Rows({**found.tensors, "packed": found.tensors["packed"][:, :-1].clone()}, found.largest)


class _FloatScale(_Named):
    def state_spec(self, shape):
        spec = super().state_spec(shape)
        return spec | {"absmax": TensorSpec(shape=spec["absmax"].shape, dtype=torch.float32)}

    def finish(self, rows, shape):
        state = super().finish(rows, shape)
        return state | {"absmax": state["absmax"].view(torch.float32)}


class _OtherShape(_Named):
    def finish(self, rows, shape):
        state = super().finish(rows, shape)
        return state | {"absmax": state["absmax"].flatten()}


class _SharedStorage(_Named):
    def finish(self, rows, shape):
        state = super().finish(rows, shape)
        joined = torch.cat([part.flatten().view(torch.int8) for part in state.values()])
        packed, absmax = joined.split([state["packed"].numel(), 4 * state["absmax"].numel()])
        return {"packed": packed.view(shape), "absmax": absmax.view(torch.int32).view(state["absmax"].shape)}


class _HidesNan(_Named):
    def quantize_rows(self, rows, *, method="absmax", measured=None):
        found = super().quantize_rows(rows.nan_to_num(0.0, 0.0, 0.0))
        return Rows(found.tensors, found.largest)


class _RoundsTwice(_Named):
    def dequantize(self, state, shape, dtype):
        first = torch.float16 if dtype == torch.bfloat16 else dtype
        return super().dequantize(state, shape, first).to(dtype)


class _OtherRows(_Named):
    def take_rows(self, state, index):
        return super().take_rows(state, index.flip(0).roll(1))


class _OtherColumns(_Named):
    def select_columns(self, state, start, stop):
        return super().select_columns(state, 0, stop - start)


class _NoBias(_Named):
    def linear(self, x, state, bias, in_features=None):
        return super().linear(x, state, None, in_features)


class _SearchesBadly(_Named):
    @property
    def methods(self):
        return ("absmax", "search")

    def quantize_rows(self, rows, *, method="absmax", measured=None, importance=None):
        return super().quantize_rows(rows if method == "absmax" else (8 * rows).round() / 8)


class _ForgetsASetting(_Named):
    def describe(self):
        return {"format": "named"}


BROKEN = {
    _OneScaleForAll: "'packed' of a row depends on other rows",
    _FloatScale: r"\['absmax'\] are floating point",
    _OtherShape: "the state is .*; state_spec says",
    _SharedStorage: "two parts share a storage",
    _HidesNan: "the weight holds nan, and the largest scale is",
    _RoundsTwice: "decoding to torch.bfloat16 is not decoding once and rounding once",
    _OtherRows: "take_rows does not decode to that part",
    _OtherColumns: r"select_columns\(.*\) does not decode to that part",
    _NoBias: "a product in torch.float32: the relative error is",
    _SearchesBadly: "'search' has an error of .*, and 'absmax' of",
    _ForgetsASetting: r"describe\(\) is {'format': 'named'}; expected .*'threshold': 6.0",
}


@pytest.mark.parametrize("kind, message", BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_format_is_found(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_format(kind(), activation_error=0.008)


def test_a_format_that_is_not_registered_can_be_checked():
    check_format(_Named(), activation_error=0.008)
    with pytest.raises(AssertionError, match=r"a product in torch.float32: the relative error is 7.*e-03"):
        check_format(_Named())
