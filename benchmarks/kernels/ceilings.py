"""What the device can do at most, measured: the ceilings that every kernel's time stands beside. Knows no kernel of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels.timing import time_in_graph, time_in_stream

_CUDA_COPY_BYTES = 2 << 30
_CUDA_MATMUL_SIDE = 8192
_CPU_COPY_BYTES = 8 << 20
_CPU_MATMUL_SIDE = 256


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of one device, as measured right before what is held against them."""

    copy_bytes_per_s: float  # of a large copy within the device's memory; read and written bytes both count
    matmul_flop_per_s: float  # of a large square product, bfloat16 on CUDA
    launch_s: float  # an empty kernel in a stream: mostly the host's time
    graph_launch_s: float | None  # an empty kernel in a CUDA graph; None on a CPU

    def floor_s(self, *, num_bytes: float, flop: float = 0.0) -> float:
        """Seconds that moving this much and computing this much take at least, if both go on at once."""
        return max(num_bytes / self.copy_bytes_per_s, flop / self.matmul_flop_per_s)


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy, a matrix product, an empty launch: about a second on a GPU."""
    on_cuda = device.type == "cuda"
    num_bytes = _CUDA_COPY_BYTES if on_cuda else _CPU_COPY_BYTES
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()  # zeros may go faster than real data
    target = torch.empty_like(source)
    copied = time_in_stream(lambda _: target.copy_(source), device=device, copies=1)
    side = _CUDA_MATMUL_SIDE if on_cuda else _CPU_MATMUL_SIDE
    dtype = torch.bfloat16 if on_cuda else torch.float32
    left, right = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiplied = time_in_stream(lambda _: torch.mm(left, right, out=product), device=device, copies=1)
    nothing = torch.zeros(1, device=device)
    launch: Callable[[torch.Tensor], None] = _touch
    if on_cuda:
        from benchmarks.kernels.empty import launch_nothing  # Triton compiles it: there is none without a GPU

        launch = launch_nothing
    launched = time_in_stream(lambda _: launch(nothing), device=device, copies=1)
    captured = time_in_graph(lambda _: launch(nothing), device=device, copies=64)
    return Ceilings(
        copy_bytes_per_s=2 * num_bytes / copied.median_s,
        matmul_flop_per_s=2 * side**3 / multiplied.median_s,
        launch_s=launched.median_s,
        graph_launch_s=captured.median_s if captured else None,
    )


def _touch(one: torch.Tensor) -> None:
    """The least that torch does in one call."""
    one.zero_()
