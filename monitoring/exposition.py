"""Prometheus' text page: every process counts into a registry of its own, and whoever is asked for the page labels and merges all of them.

The registries and the format are `prometheus_client`'s; what travels between processes are its family records, which pickle.

    a replica's PrometheusSink -> families --+
    the ingress's PrometheusSink -> families +-> Part(origin, name, families) -> page(parts) -> /metrics
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitoring.catalogue import Kind, Metric, Origin

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Families = tuple[Family, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What one process counted. `name` becomes the value of the origin's label."""

    origin: Origin
    name: str
    families: Families

    def labelled(self, labels: Mapping[str, str]) -> dict[str, str]:
        """A sample's labels with that of the origin; vLLM's families have theirs already."""
        return dict(labels) if "engine" in labels else {self.origin.value: self.name, **labels}


class PrometheusSink:
    """A `MetricSink` over one registry: the metrics of one process. Thread-safe."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._registry = CollectorRegistry()
        self._wrappers = {metric.name: _wrapper(metric, self._registry) for metric in metrics}

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        wrapper = self._wrappers[metric.name]
        assert isinstance(wrapper, Counter), f"{metric.name} is no counter"
        (wrapper.labels(**labels) if labels else wrapper).inc(value)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        wrapper = self._wrappers[metric.name]
        assert isinstance(wrapper, Gauge), f"{metric.name} is no gauge"
        (wrapper.labels(**labels) if labels else wrapper).set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Count a value of a histogram."""
        wrapper = self._wrappers[metric.name]
        assert isinstance(wrapper, Histogram), f"{metric.name} is no histogram"
        (wrapper.labels(**labels) if labels else wrapper).observe(value)

    def families(self) -> Families:
        """Everything counted so far, families without a sample left out."""
        return tuple(family for family in self._registry.collect() if family.samples)


def page(parts: Sequence[Part]) -> bytes:
    """One text page of all parts: each family once, each sample with the label of its origin."""
    return generate_latest(_Merged(parts))


class _Merged(Collector):
    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def collect(self) -> Iterable[Family]:
        merged: dict[str, Family] = {}
        for part in self._parts:
            for family in part.families:
                target = merged.setdefault(family.name, Family(family.name, family.documentation, family.type))
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        target.add_sample(sample.name, part.labelled(sample.labels), sample.value)
        return merged.values()


def _wrapper(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind is Kind.COUNTER:
        return Counter(metric.name, metric.help, metric.labels, registry=registry)
    if metric.kind is Kind.GAUGE:
        return Gauge(metric.name, metric.help, metric.labels, registry=registry)
    return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)
