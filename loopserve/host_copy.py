"""A tensor on its way to the host. Floor 4 beside the model; used by what brings a step's results back.

The copy is queued where it is made, so that it waits for the work before it and not for what is queued later: `tensor.tolist()` would wait
for the next step, too, once that is launched.
"""

import torch
from torch import Tensor


class HostCopy:
    """Begins the copy at once; from CUDA into pinned memory, without waiting."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._done = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
