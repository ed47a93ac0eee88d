"""Times a call on a device: medians of events on CUDA, of the clock on a CPU. Knows nothing about what is called.

A call is told which copy of its inputs to take. Copies take turns, and together they are larger than the cache, so that no call finds
what it reads where the call before left it. The first calls are not counted: they compile.

Two times of the same call are told apart. In a stream, the host hands over one call after the other: what a short call costs there is
often the host's time, not the device's. In a CUDA graph the host is left out, as it is in a captured decode step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]  # takes the index of a copy of the inputs

REPEATS = 20
CPU_REPEATS = 5
WARM_UP = 3
COPIES_MAX = 512
GRAPH_CALLS_MIN = 20  # in one graph: of fewer, the time of starting a graph would be a large part
_CPU_CACHE_BYTES = 1 << 20  # toy inputs on a CPU are for trying the code out, not for its numbers


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int
    copies: int

    @classmethod
    def of(cls, seconds: list[float], copies: int) -> Timing:
        """From the seconds of each repeat."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds), copies)


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before the device's memory."""
    if device.type != "cuda":
        return _CPU_CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def num_copies(bytes_a_copy: int, device: torch.device, *, most: int = COPIES_MAX) -> int:
    """Copies of inputs of that size that are together more than twice the cache: 1 where one is, at most `most`."""
    return min(most, 2 * cache_bytes(device) // max(1, bytes_a_copy) + 1)


def time_in_stream(call: Call, *, device: torch.device, copies: int, repeats: int = REPEATS) -> Timing:
    """Each call between two events of its own, one call after the other."""
    for index in range(WARM_UP):
        call(index % copies)
    if device.type != "cuda":
        seconds = []
        for index in range(min(repeats, CPU_REPEATS)):
            started = time.perf_counter()
            call(index % copies)
            seconds.append(time.perf_counter() - started)
        return Timing.of(seconds, copies)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for index, (begin, end) in enumerate(events):
        begin.record()
        call((WARM_UP + index) % copies)
        end.record()
    torch.cuda.synchronize(device)
    return Timing.of([begin.elapsed_time(end) / 1e3 for begin, end in events], copies)


def time_in_graph(call: Call, *, device: torch.device, copies: int, repeats: int = REPEATS) -> Timing | None:
    """Mean call of a graph in which every copy has its turn; None on a CPU, which has no graphs.

    Raises RuntimeError where the call cannot be captured: it waits for the device.
    """
    if device.type != "cuda":
        return None
    for index in range(WARM_UP):
        call(index % copies)
    torch.cuda.synchronize(device)
    num_calls = copies * -(-GRAPH_CALLS_MIN // copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(num_calls):
            call(index % copies)
    whole = time_in_stream(lambda _: graph.replay(), device=device, copies=1, repeats=repeats)
    graph.reset()
    return Timing(whole.median_s / num_calls, whole.low_s / num_calls, whole.high_s / num_calls, repeats, copies)
