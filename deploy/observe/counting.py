"""Counts of many processes as one that never falls, and quantiles of histogram differences. Pure; knows no metric by name.

Processes come, go and start again; each counts from zero. An odometer adds up what every one of them counted while it was watched:

    process a   3  7  9  -  -        gone: what it counted stays
    process b   -  -  40 42 1        first seen at 40: that is where watching begins; 1 after 42 is a restart
    odometer    0  4  6  8  9
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

SOURCES_MAX = 1024  # processes that are remembered, the longest unseen goes first


class SampleLike(Protocol):
    """One number of an exposition, as `prometheus_client` has it and as Prometheus answers it."""

    @property
    def name(self) -> str:
        """As it is exported: of a histogram, with `_bucket`, `_sum` or `_count`."""

    @property
    def labels(self) -> Mapping[str, str]:
        """All labels."""

    @property
    def value(self) -> float:
        """The number."""


class Sample(NamedTuple):
    """A sample of our own."""

    name: str
    labels: Mapping[str, str]
    value: float


class CountKey(NamedTuple):
    """A count of the whole fleet: its series name, and its labels without those that name a process."""

    name: str
    labels: tuple[tuple[str, str], ...]

    def label(self, name: str) -> str:
        """The value of a label; "" where it has none."""
        return next((value for label, value in self.labels if label == name), "")


Counts = Mapping[CountKey, float]


class Odometer:
    """Adds up counters over processes, restarts included."""

    def __init__(self, *, sources_max: int = SOURCES_MAX) -> None:
        self._sources_max = sources_max
        self._last: dict[str, dict[CountKey, float]] = {}  # by process, the longest unseen first
        self._totals: dict[CountKey, float] = {}

    def read(self, samples: Iterable[SampleLike], *, source_label: str) -> dict[CountKey, float]:
        """The counts after these samples, all taken at one moment. A process that is not in them keeps what it had."""
        for source, counts in _by_source(samples, source_label).items():
            known = self._last.pop(source, None)
            for key, value in counts.items():
                before = value if known is None else known.get(key, 0.0)  # a new series of a known process began at 0
                self._totals[key] = self._totals.get(key, 0.0) + (value - before if value >= before else value)
            self._last[source] = {**(known or {}), **counts}
        while len(self._last) > self._sources_max:
            del self._last[next(iter(self._last))]
        return dict(self._totals)


def _by_source(samples: Iterable[SampleLike], source_label: str) -> dict[str, dict[CountKey, float]]:
    found: dict[str, dict[CountKey, float]] = {}
    for sample in samples:
        if math.isfinite(sample.value):
            labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != source_label))
            found.setdefault(sample.labels.get(source_label, ""), {})[CountKey(sample.name, labels)] = sample.value
    return found


def difference(later: Counts, earlier: Counts) -> dict[CountKey, float]:
    """What was counted between two readings of one odometer."""
    return {key: value - earlier.get(key, 0.0) for key, value in later.items()}


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float | None:
    """The value that `share` of the observations do not exceed; None where there are none.

    `buckets` are (upper bound, observations up to it), ascending, the last bound infinite. Inside a bucket observations count as spread
    evenly; what lies above the last finite bound is that bound, as nothing more is known of it.
    """
    num = buckets[-1][1] if buckets else 0.0
    if num <= 0:
        return None
    low, below = 0.0, 0.0
    for upper, up_to in buckets:
        if up_to >= share * num and up_to > below:
            return low if math.isinf(upper) else low + (upper - low) * max(0.0, share * num - below) / (up_to - below)
        low, below = (low if math.isinf(upper) else upper), up_to
    return low
