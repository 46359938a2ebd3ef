"""WarmUp: let Triton start while a load is planned and the first weights are read.

The first launch in a process finds the driver, and hashes Triton's library of 416 MB unless an earlier process left the
result; torch loads each of its kernels at its first call. Together that takes up to 0.6 s, and reading 16 GB takes 0.5.
Here it happens in a thread, mostly outside of Python's lock.
"""

from types import TracebackType

import torch

from bigq.checkpoint import ScaledRows, Source, StoredTensor
from bigq.config import QuantizationConfig
from bigq.formats import Description, Format
from bigq.loading.batch_quantizer import BatchQuantizer
from bigq.loading.runs import Piece
from bigq.planning.plan import PlannedWeight
from bigq.system.interrupts import Worker, to_the_end

__all__ = ["WarmUp"]

_SHAPE = (16, 4096)  # every size a multiple of 16, as in most models: the kernel that Triton compiles for them


class WarmUp:
    """Quantizes a few zeros of each dtype of `source` on `device`, in a thread; `wait` for it before other launches.

    It decodes zeros of each kind of codes first.

    Triton's start is not meant for two threads at once. On the CPU there is nothing to warm up. Use it as a context
    manager: no thread is left when it is done.
    """

    def __init__(self, config: QuantizationConfig | None, source: Source, device: torch.device) -> None:
        self._error: BaseException | None = None
        self._thread: Worker | None = None
        if config is not None and device.type == "cuda":
            self._formats, self._device = config.formats(), device
            self._method = "absmax" if config.moments is None else config.method
            found = {info.dtype for info in source.tensors.values() if len(info.shape) >= 2}
            self._dtypes = found & {torch.float16, torch.bfloat16, torch.float32}
            codings = [info.coding for info in source.tensors.values() if info.coding is not None]
            self._codings = {(coding.codes, coding.scales[0].dtype): coding for coding in codings if coding.nbytes}
            self._thread = Worker(self._run)
            self._thread.start()

    def __enter__(self) -> "WarmUp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            try:
                self._thread.join()
            except BaseException:  # also an interrupt as it is entered
                to_the_end(self._thread.join)
                raise

    def wait(self) -> None:
        """Return when it is done; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for coding in self._codings.values():
                self._decode_zeros(coding)
            for dtype in self._dtypes:
                for weight_format in self._formats:
                    self._quantize_zeros(dtype, weight_format)
        except BaseException as error:  # raised by wait()
            self._error = error

    def _decode_zeros(self, coding: ScaledRows) -> None:
        """The first entry of a tensor: a row, or a matrix of a stack."""
        nbytes = sum(scales.nbytes for scales in coding.plain_scales(0, 1))
        if nbytes:
            sizes = coding.nbytes // coding.shape[0], nbytes
            codes, scales = (torch.zeros(size, dtype=torch.uint8, device=self._device) for size in sizes)
            coding.decode(codes, 0, scales)

    def _quantize_zeros(self, dtype: torch.dtype, weight_format: Format) -> None:
        """Two neighbours, as the weights of a run are."""
        rows = torch.zeros(_SHAPE, dtype=dtype, device=self._device).chunk(2)
        description = Description(format=weight_format, shape=tuple(rows[0].shape), dtype=dtype)
        method = self._method if self._method in weight_format.methods else "absmax"
        importance = torch.ones(_SHAPE[1], dtype=torch.float32) if method == "search" else None
        weight = PlannedWeight(
            names=("",), refs=(), description=description, source="", method=method, importance=importance
        )
        info = StoredTensor(name="", shape=rows[0].shape, dtype=dtype, where="")
        quantizer = BatchQuantizer()
        states = [state for _, state in quantizer.quantize((weight, Piece(info, 0, matrix)) for matrix in rows)]
        quantizer.quant_state({"weight": description}, rows[0].device)
        quantizer.non_finite(lambda _: (description, states[0]))
