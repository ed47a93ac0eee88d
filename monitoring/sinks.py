"""Where numbers go: the contract between those who count and those who export. A metric is named by its row of the catalogue."""

from collections.abc import Sequence
from typing import Protocol

from monitoring.catalogue import Metric


class MetricSink(Protocol):
    """Takes numbers from any thread; never blocks, never raises for a number. Labels are those of the metric, without its origin."""

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Count a value of a histogram."""


class Fan:
    """One sink out of several."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """See `MetricSink`."""
        for sink in self._sinks:
            sink.inc(metric, value, **labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """See `MetricSink`."""
        for sink in self._sinks:
            sink.set(metric, value, **labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """See `MetricSink`."""
        for sink in self._sinks:
            sink.observe(metric, value, **labels)
