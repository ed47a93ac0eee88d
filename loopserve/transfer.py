"""Numbers on their way between host and device, so that neither waits for the other's queue. Floor 2; used wherever a step does either.

A plain `torch.tensor(numbers, device="cuda")` waits until all that is queued is done, and so does `tensor.tolist()`, which would wait
for the next step, too, once that is launched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[int] | Sequence[float] | Sequence[Sequence[int]]


def on_device(numbers: Numbers, device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of some numbers, int64 or float32 unless `dtype` says otherwise; to CUDA by way of pinned memory, in the queue's order."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class HostCopy:
    """A tensor's values for the host: from CUDA into pinned memory, in the queue's order, begun at once."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._done = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> Tensor:
        """The values on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
