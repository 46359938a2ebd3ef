"""WarmUp: let Triton start while the checkpoint is opened, planned and first read.

The first launch in a process hashes Triton's 461 MB library and finds the driver, which takes about as long as reading
16 GB. It happens in a thread, and mostly outside of Python's lock.
"""

from threading import Thread

import torch

from bigq.config import QuantizationConfig
from bigq.model_tensors import Source

__all__ = ["WarmUp"]

_SHAPE = (16, 4096)  # every size a multiple of 16, as in most models: the kernel that Triton compiles for them


class WarmUp:
    """Quantizes a few zeros of each dtype of `source` on `device`, in a thread; `wait` for it before other launches.

    Triton's start is not meant for two threads at once. On the CPU there is nothing to warm up.
    """

    def __init__(self, config: QuantizationConfig | None, source: Source, device: torch.device) -> None:
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        if config is not None and device.type == "cuda":
            self._format, self._device = config.weight_format(), device
            found = {info.dtype for info in source.tensors.values() if len(info.shape) == 2}
            self._dtypes = found & {torch.float16, torch.bfloat16, torch.float32}
            self._thread = Thread(target=self._run)
            self._thread.start()

    def wait(self) -> None:
        """Return when it is done; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for dtype in self._dtypes:
                self._format.quantize(torch.zeros(_SHAPE, dtype=dtype, device=self._device))
        except BaseException as error:  # raised by wait()
            self._error = error
