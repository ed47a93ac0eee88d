"""The same numbers through Ray's metrics API: they arrive at Prometheus as `ray_loopserve_...` from each node's agent.

A `MetricSink`. Ray drops a gauge that is not set again within twice its report interval, so every gauge is kept here and set again by
`refresh`, which its owner calls from a background task.
"""

import threading
from collections.abc import Iterable
from typing import Any

from monitoring.catalogue import Kind, Metric, Origin


class RaySink:
    """One process's metrics in Ray's API. `api` is `ray.util.metrics`, injected: this room does not import Ray."""

    def __init__(self, metrics: Iterable[Metric], *, api: Any, origin: Origin, name: str) -> None:
        self._origin_label = {origin.value: name}
        self._handles = {metric.name: _handle(metric, api) for metric in metrics}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter. Ray refuses 0, which adds nothing anyway."""
        if value > 0:
            self._handles[metric.name].inc(value, tags={**self._origin_label, **labels})

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge, from now on again at every refresh."""
        with self._lock:
            self._gauges[metric.name, tuple(labels.items())] = value
        self._handles[metric.name].set(value, tags={**self._origin_label, **labels})

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Count a value of a histogram."""
        self._handles[metric.name].observe(value, tags={**self._origin_label, **labels})

    def refresh(self) -> None:
        """Set every gauge again."""
        with self._lock:
            gauges = list(self._gauges.items())
        for (name, labels), value in gauges:
            self._handles[name].set(value, tags={**self._origin_label, **dict(labels)})


def _handle(metric: Metric, api: Any) -> Any:
    if metric.kind is Kind.COUNTER:
        # Ray appends `_total` itself.
        return api.Counter(metric.name.removesuffix("_total"), metric.help, tag_keys=metric.all_labels)
    if metric.kind is Kind.GAUGE:
        return api.Gauge(metric.name, metric.help, tag_keys=metric.all_labels)
    return api.Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=metric.all_labels)
