"""What a board shows at one time: every query of its JSON asked of a Prometheus, as Grafana asks it. Knows nothing about drawing."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from monitoring.dashboards import path_of
from monitoring.dashboards.panels import Board

_POINTS = 240  # of a line: as many as its panel has pixels, about


@dataclass(frozen=True, slots=True)
class Span:
    """What is shown, in unix seconds, and the scrape interval that the data source is set to in Grafana."""

    start_s: float
    end_s: float
    scrape_s: float = 5.0

    @property
    def step_s(self) -> float:
        """Between two points."""
        return max(self.scrape_s, round((self.end_s - self.start_s) / _POINTS))

    @property
    def rate_interval_s(self) -> int:
        """Grafana's `$__rate_interval`."""
        return math.ceil(max(self.step_s + self.scrape_s, 4 * self.scrape_s))


def answered(board: Board, prometheus: httpx.Client, span: Span) -> dict[str, Any]:
    """The board's JSON with the series of every panel. Raises httpx.HTTPError, or ValueError with Prometheus' words."""
    document: dict[str, Any] = json.loads(path_of(board).read_text(encoding="utf-8"))
    for panel in document["panels"]:
        panel["series"] = [
            {"refId": target["refId"], **series}
            for target in panel.get("targets", ())
            for series in _series(target, prometheus, span)
        ]
    return {
        "title": board.title,
        "panels": document["panels"],
        "from": span.start_s * 1000,
        "to": span.end_s * 1000,
    }


def _series(target: Mapping[str, Any], prometheus: httpx.Client, span: Span) -> list[dict[str, Any]]:
    """Name and points of each series of one query."""
    query = target["expr"].replace("$__rate_interval", f"{span.rate_interval_s}s")
    query = query.replace("$job", ".+").replace("$replica", ".+")
    if target["instant"]:
        found = _ask(prometheus, "query", query=query, time=span.end_s)
    else:
        found = _ask(prometheus, "query_range", query=query, start=span.start_s, end=span.end_s, step=span.step_s)
    series = []
    for result in found:
        values = result["values"] if "values" in result else [result["value"]]
        points = [(at * 1000, _number(text)) for at, text in values]
        series.append({"name": _named(target["legendFormat"], result["metric"]), "points": points})
    return series if target["instant"] else sorted(series, key=lambda one: _natural(one["name"]))


def _ask(prometheus: httpx.Client, question: str, **parameters: Any) -> list[dict[str, Any]]:
    answer = prometheus.get(f"/api/v1/{question}", params=parameters).json()
    if answer["status"] != "success":
        raise ValueError(f"{parameters['query']}: {answer.get('error')}")
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def _number(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), legend)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Turn 9 before turn 17."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))
