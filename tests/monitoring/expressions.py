"""What an expression reads, taken from its syntax tree: every selector, and every label that it names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser as promql

from monitoring.catalogue import CATALOGUE, Kind, Metric

SCRAPE_LABELS = frozenset({"job"})  # given by Prometheus
BY_SERIES: dict[str, Metric] = {name: metric for metric in CATALOGUE for name in metric.series}


@dataclass(frozen=True)
class Selector:
    """One series selector: its name, the labels it matches on, and the range it looks over, if any."""

    name: str
    labels: frozenset[str]
    range_s: float | None = None


@dataclass(frozen=True)
class Reading:
    """What one expression reads, and the labels that its result can have (None: those of the catalogue's series)."""

    selectors: tuple[Selector, ...]
    named_labels: frozenset[str]  # of matchers, groupings and vector matching
    faults: tuple[str, ...]


def substituted(expression: str, *, window: str = "1m", job: str = ".+", replica: str = ".+") -> str:
    """The expression as Grafana sends it."""
    for name, value in (("$__rate_interval", window), ("$job", job), ("$replica", replica)):
        expression = expression.replace(name, value)
    assert "$" not in expression, f"an unknown variable is in {expression}"
    return expression


def read(expression: str) -> Reading:
    """Parse, and judge against the catalogue. Raises ValueError where it is no PromQL."""
    selectors, named, faults = [], set(), []
    for node in _walk(promql.parse(expression)):
        if isinstance(node, promql.VectorSelector | promql.MatrixSelector):
            selector = _selector(node)
            selectors.append(selector)
            named |= selector.labels
            faults += _faults(selector)
        elif isinstance(node, promql.Call) and node.func.name in ("rate", "increase"):
            faults += [
                f"{s.name} is no counter, but in {node.func.name}()"
                for s in map(_selector, node.args)
                if s.name in BY_SERIES and BY_SERIES[s.name].kind is Kind.GAUGE
            ]
        elif isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            inside = set().union(*(_labels_of(s.name) for s in map(_selector, _matrices(node.expr)))) | SCRAPE_LABELS
            faults += [f"grouped by {label}, which nothing inside has" for label in set(node.modifier.labels) - inside]
            named |= set(node.modifier.labels)
        elif isinstance(node, promql.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
            named |= set(node.modifier.matching.labels)
    return Reading(tuple(selectors), frozenset(named), tuple(faults))


def legend_labels(legend: str) -> frozenset[str]:
    """The labels that a legend shows."""
    return frozenset(re.findall(r"{{\s*(\w+)\s*}}", legend))


def _labels_of(name: str) -> frozenset[str]:
    metric = BY_SERIES.get(name)
    if metric is None:
        return frozenset()
    return frozenset(metric.all_labels) | (frozenset({"le"}) if name.endswith("_bucket") else frozenset())


def _faults(selector: Selector) -> Iterator[str]:
    if selector.name not in BY_SERIES:
        yield f"{selector.name} is not in the catalogue"
        return
    for label in selector.labels - _labels_of(selector.name) - SCRAPE_LABELS:
        yield f"{selector.name} has no label {label}"


def _selector(node: Any) -> Selector:
    if isinstance(node, promql.MatrixSelector):
        inner = _selector(node.vector_selector)
        return Selector(inner.name, inner.labels, node.range.total_seconds())
    labels = frozenset(matcher.name for matcher in node.matchers.matchers)
    return Selector(node.name or "", labels)


def _matrices(node: Any) -> Iterator[Any]:
    return (found for found in _walk(node) if isinstance(found, promql.VectorSelector | promql.MatrixSelector))


def _walk(node: Any) -> Iterator[Any]:
    """Every node once; a range selector stands for the selector inside it."""
    yield node
    if isinstance(node, promql.BinaryExpr):
        children = [node.lhs, node.rhs]
    elif isinstance(node, promql.Call):
        children = list(node.args)
    elif isinstance(node, promql.AggregateExpr | promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        children = [node.expr]
    else:
        children = []
    for child in children:
        yield from _walk(child)
