"""Owns what `torch.profiler` saw of some steps: when the device worked, when it waited, and what the host did meanwhile.

Read from the profiler's Chrome trace, which keeps its form over torch's releases. On CUDA the device's work is kernels, copies
and fills, those of replayed graphs included. On a CPU, where both are one, outermost operators on the step's thread stand for it: the same
code runs, its numbers say nothing about a device. Knows nothing about what the steps compute.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.engine.device import synchronize

_STEP = "loopserve step"
_OUTSIDE = "Python, outside of torch"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_WORK = ("cpu_op", "cuda_runtime", "cuda_driver", "user_annotation", "python_function")
_OURS = re.compile(r"(^|/)(loopserve|benchmarks)/.*\.py\(")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_GAP_SIZES_US = (10.0, 100.0, 1000.0)  # upper ends; the last class has none


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start_us` to `end_us` of the trace."""

    name: str
    start_us: float
    end_us: float

    @property
    def length_us(self) -> float:
        """How long it took."""
        return self.end_us - self.start_us


class Times:
    """Microseconds by name."""

    def __init__(self) -> None:
        self._us: dict[str, float] = {}

    def add(self, name: str, us: float) -> None:
        """Give a name more of them."""
        self._us[name] = self._us.get(name, 0.0) + us

    def update(self, other: Times) -> None:
        """Add all of another's."""
        for name, us in other._us.items():
            self.add(name, us)

    def most_common(self, num: int | None = None) -> list[tuple[str, float]]:
        """Names and their time, most first."""
        return sorted(self._us.items(), key=lambda item: item[1], reverse=True)[:num]


@dataclass(frozen=True, slots=True)
class Gap:
    """The device had nothing to do."""

    start_us: float  # from the first step's begin
    length_us: float
    host: tuple[tuple[str, float], ...]  # what the host spent it on, and how many us, most first
    next_work: str  # what ended it; "" where the steps ended first


@dataclass(frozen=True, slots=True)
class Activity:
    """Some steps in a row. Times are of all of them together."""

    num_steps: int
    wall_us: float
    steps: tuple[Span, ...]
    device: tuple[Span, ...]  # the device's work inside the steps, by start
    host: tuple[Span, ...]  # what the host's thread did inside the steps, each moment once, by start
    functions: tuple[Span, ...]  # the innermost of our own functions meanwhile; empty where Python was not traced

    @property
    def busy_us(self) -> float:
        """Time in which the device did anything: work that overlaps counts once."""
        return sum(end - start for start, end in merged(self.device))

    @property
    def idle_share(self) -> float:
        """Of the wall time, in which the device did nothing."""
        return 1.0 - self.busy_us / self.wall_us

    def gaps(self) -> list[Gap]:
        """Every pause of the device, longest first."""
        host, origin = _Pieces(self.host), self.steps[0].start_us
        begins = [span.start_us for span in self.device]
        found = []
        for start, end, is_last in self._pauses():
            following = bisect_left(begins, end)
            name = self.device[following].name if following < len(begins) and not is_last else ""
            found.append(Gap(start - origin, end - start, tuple(host.within(start, end).most_common()), name))
        return sorted(found, key=lambda gap: gap.length_us, reverse=True)

    def gap_classes(self) -> list[dict[str, float | int | str]]:
        """How many gaps of which size there are, and what they sum up to."""
        lengths = [gap.length_us for gap in self.gaps()]
        lows, highs = (0.0, *_GAP_SIZES_US), (*_GAP_SIZES_US, float("inf"))
        classes: list[dict[str, float | int | str]] = []
        for low, high in zip(lows, highs, strict=True):
            inside = [length for length in lengths if low <= length < high]
            label = f"{low:g} us and more" if high == float("inf") else f"{low:g} to {high:g} us"
            classes.append({"size": label, "count": len(inside), "total_us": sum(inside)})
        return classes

    def top_work(self, num: int) -> list[tuple[str, float, int]]:
        """The device's work by name: us, and how many times; most time first. Overlapping work counts for each."""
        times, counts = Times(), Counter[str]()
        for span in self.device:
            times.add(span.name, span.length_us)
            counts[span.name] += 1
        return [(name, us, counts[name]) for name, us in times.most_common(num)]

    def functions_while_idle(self, num: int) -> list[tuple[str, float]]:
        """Which of our functions the host was in, what they call included unless it is ours too, in all gaps together: us, most first."""
        functions, times = _Pieces(self.functions), Times()
        for start, end, _ in self._pauses():
            times.update(functions.within(start, end))
        return times.most_common(num)

    def _pauses(self) -> Iterator[tuple[float, float, bool]]:
        """Begin and end of every pause, in order, and whether the step ends with it."""
        for step in self.steps:
            at = step.start_us
            for start, end in [*merged(_clipped(self.device, step)), (step.end_us, step.end_us)]:
                if start > at:
                    yield at, start, start == step.end_us
                at = max(at, end)


class _Pieces:
    """Spans that do not overlap, by start; finds those within a time without looking at all."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._ends = [span.end_us for span in spans]

    def within(self, start_us: float, end_us: float) -> Times:
        """How many us of the time belong to which name."""
        times = Times()
        for index in range(bisect_right(self._ends, start_us), len(self._spans)):
            span = self._spans[index]
            if span.start_us >= end_us:
                break
            times.add(span.name, min(span.end_us, end_us) - max(span.start_us, start_us))
        return times


def record_steps(
    step: Callable[[], object],
    num_steps: int,
    device: torch.device,
    *,
    stacks: bool = False,
    keep_trace: Path | None = None,
) -> Activity:
    """Profile `num_steps` calls, after one inside the profiler that is not counted: its start is slow.

    With `stacks`, Python functions are traced as well, which makes the host several times as slow. The Chrome trace goes to `keep_trace`,
    gzipped.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities, with_stack=stacks) as profiler:
        step()
        for _ in range(num_steps):
            with record_function(_STEP):
                step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_bytes()
    if keep_trace is not None:
        keep_trace.write_bytes(gzip.compress(text))
    return read_trace(json.loads(text)["traceEvents"], on_device=device.type == "cuda")


def read_trace(events: Iterable[dict[str, Any]], *, on_device: bool) -> Activity:
    """The steps of a Chrome trace. Raises ValueError where there is none, or the device did nothing in them."""
    complete = [event for event in events if event.get("ph") == "X"]
    marks = [e for e in complete if e.get("cat") == "user_annotation" and e["name"] == _STEP]
    if not marks:
        raise ValueError("the trace holds no step")
    steps = _without_breaks(sorted((_span(event) for event in marks), key=lambda span: span.start_us))
    thread = (marks[0]["pid"], marks[0]["tid"])
    on_thread = [event for event in complete if (event["pid"], event["tid"]) == thread]
    host = _innermost(_span(event) for event in on_thread if event.get("cat") in _HOST_WORK)
    functions = _innermost(
        _span(event) for event in on_thread if event.get("cat") == "python_function" and _OURS.search(event["name"])
    )
    if on_device:
        work = [_span(event) for event in complete if event.get("cat") in _DEVICE_WORK]
    else:
        work = _outermost(_span(event) for event in on_thread if event.get("cat") == "cpu_op")
    inside = [span for step in steps for span in _clipped(work, step)]
    if not inside:
        raise ValueError("the trace holds no work of the device: the profiler cannot see it")
    return Activity(
        num_steps=len(steps),
        wall_us=sum(step.length_us for step in steps),
        steps=steps,
        device=tuple(sorted(inside, key=lambda span: span.start_us)),
        host=tuple(span for step in steps for span in _clipped(host, step)),
        functions=tuple(span for step in steps for span in _clipped(functions, step)),
    )


def merged(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """What spans cover together, as intervals that do not touch. They are given by start."""
    intervals: list[tuple[float, float]] = []
    for span in spans:
        if intervals and span.start_us <= intervals[-1][1]:
            intervals[-1] = (intervals[-1][0], max(intervals[-1][1], span.end_us))
        else:
            intervals.append((span.start_us, span.end_us))
    return intervals


def _without_breaks(marks: Sequence[Span]) -> tuple[Span, ...]:
    """Steps that each last until the next begins, so that nothing between two of them is lost."""
    ends = [*(mark.start_us for mark in marks[1:]), marks[-1].end_us]
    return tuple(Span(mark.name, mark.start_us, end) for mark, end in zip(marks, ends, strict=True))


def _outermost(spans: Iterable[Span]) -> list[Span]:
    """Of nested spans of one thread those that lie in no other, by start."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start_us, -span.end_us)):
        if not found or span.start_us >= found[-1].end_us:
            found.append(span)
    return found


def _innermost(spans: Iterable[Span]) -> list[Span]:
    """Nested spans of one thread, cut so that every moment belongs to the innermost alone, by start."""
    pieces: list[Span] = []
    open_spans: list[Span] = []
    at = 0.0

    def advance(to: float) -> None:
        nonlocal at
        if open_spans and to > at:
            name = open_spans[-1].name
            pieces.append(Span(_OUTSIDE if name == _STEP else name, at, to))
        at = max(at, to)

    for span in sorted(spans, key=lambda span: (span.start_us, -span.end_us)):
        while open_spans and open_spans[-1].end_us <= span.start_us:
            advance(open_spans[-1].end_us)
            open_spans.pop()
        advance(span.start_us)
        at = span.start_us
        open_spans.append(span)
    while open_spans:
        advance(open_spans[-1].end_us)
        open_spans.pop()
    return pieces


def _clipped(spans: Iterable[Span], window: Span) -> list[Span]:
    return [
        Span(span.name, max(span.start_us, window.start_us), min(span.end_us, window.end_us))
        for span in spans
        if span.end_us > window.start_us and span.start_us < window.end_us
    ]


def _span(event: dict[str, Any]) -> Span:
    start = float(event["ts"])
    return Span(_ADDRESS.sub("", str(event["name"])), start, start + float(event.get("dur", 0.0)))
