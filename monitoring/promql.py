"""PromQL over the catalogue: expressions are made from its rows, so no name or label is written twice, and none that does not exist.

Every expression reduces to one series per process that counts before it adds up: each ingress shows the whole application, and scraping two
addresses of one application must not count it twice. Knows nothing about panels or alerts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from monitoring.catalogue import Kind, Metric, Origin

_REGEX_SIGNS = frozenset(".|*+?[](){}^$\\")


@dataclass(frozen=True, slots=True)
class Scope:
    """Which series count, and over what window a rate is taken. `job` and `replica` are regular expressions; empty: all."""

    window: str
    job: str = ""
    replica: str = ""

    def now(self, metric: Metric, *, by: Iterable[str] = (), fold: str = "sum", **where: str) -> str:
        """A gauge, folded over what `by` does not name."""
        assert metric.kind is Kind.GAUGE, metric.name
        return _folded(fold, by, metric.all_labels, self._series(metric, metric.name, where))

    def over(self, function: str, metric: Metric, *, by: Iterable[str] = (), fold: str = "sum", **where: str) -> str:
        """A function of a gauge's last window (`max_over_time`, `deriv`, ...), folded as `now` does."""
        assert metric.kind is Kind.GAUGE, metric.name
        found = f"{function}({self._series(metric, metric.name, where)}[{self.window}])"
        return _folded(fold, by, metric.all_labels, found)

    def rate(self, metric: Metric, *, by: Iterable[str] = (), function: str = "rate", **where: str) -> str:
        """Events a second (or `increase`) of a counter, or of a histogram's count."""
        assert metric.kind is not Kind.GAUGE, metric.name
        return self._rate(metric, "_count" if metric.kind is Kind.HISTOGRAM else "", by, where, function)

    def total(self, metric: Metric, *, by: Iterable[str] = (), offset: str = "", **where: str) -> str:
        """A counter as it stands, or as it stood `offset` ago."""
        assert metric.kind is Kind.COUNTER, metric.name
        series = self._series(metric, metric.name, where)
        return _folded("sum", by, metric.all_labels, f"{series} offset {offset}" if offset else series)

    def quantile(self, share: float, metric: Metric, *, by: Iterable[str] = (), **where: str) -> str:
        """The value that `share` of a histogram's observations do not exceed."""
        by = (*by, "le")
        return f"histogram_quantile({share:g}, {self._rate(metric, '_bucket', by, where)})"

    def mean(self, metric: Metric, *, by: Iterable[str] = (), **where: str) -> str:
        """The mean of a histogram's observations within the window."""
        by = tuple(by)
        return f"{self._rate(metric, '_sum', by, where)} / {self._rate(metric, '_count', by, where)}"

    def share_within(self, metric: Metric, bound: float, *, by: Iterable[str] = (), **where: str) -> str:
        """Share of a histogram's observations up to `bound`, which must be one of its buckets."""
        assert bound in metric.buckets, f"{metric.name} has no bucket {bound}: {metric.buckets}"
        by = tuple(by)
        within = self._rate(metric, "_bucket", by, {**where, "le": f"{bound:g}"})
        return f"{within} / {self._rate(metric, '_count', by, where)}"

    def _rate(
        self, metric: Metric, suffix: str, by: Iterable[str], where: dict[str, str], function: str = "rate"
    ) -> str:
        labels = (*metric.all_labels, "le") if suffix == "_bucket" else metric.all_labels
        found = f"{function}({self._series(metric, metric.name + suffix, where)}[{self.window}])"
        return _folded("sum", by, labels, found)

    def _series(self, metric: Metric, name: str, where: dict[str, str]) -> str:
        """One selector. Values that look like a regular expression are matched as one."""
        matchers = [f'job=~"{self.job}"'] if self.job else []
        if self.replica and metric.origin is Origin.ENGINE:
            matchers.append(f'replica=~"{self.replica}"')
        for label, value in where.items():
            assert label in metric.all_labels or label == "le", f"{name} has no label {label}"
            matchers.append(_bucket(value) if label == "le" else _matcher(label, value))
        return f"{name}{{{', '.join(matchers)}}}" if matchers else name


def or_zero(expression: str) -> str:
    """Nothing counted yet is zero; only for expressions without labels."""
    return f"({expression} or vector(0))"


def ratio(part: str, whole: str) -> str:
    """One expression over another; absent where the whole is."""
    return f"{part} / {whole}"


def _folded(fold: str, by: Iterable[str], labels: tuple[str, ...], found: str) -> str:
    by = tuple(by)
    assert set(by) <= set(labels), f"{by} of {labels}"
    single = f"max by ({', '.join(labels)}) ({found})"
    if set(by) == set(labels):
        return single
    return f"{fold} by ({', '.join(by)}) ({single})" if by else f"{fold}({single})"


def _matcher(label: str, value: str) -> str:
    return f'{label}{"=~" if _REGEX_SIGNS & set(value) else "="}"{value}"'


def _bucket(bound: str) -> str:
    """Exporters write a whole bound as 1 or 1.0."""
    return f'le="{bound}"' if "." in bound else f'le=~"{bound}(\\\\.0)?"'
