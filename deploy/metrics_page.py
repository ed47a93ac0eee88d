"""What the ingress counts, and the page of the whole application: every process is asked, none is left out silently. Hop 1 and 12.

`IngressMetrics` is this process's own count; `RequestCounter` the ASGI layer that feeds it; `MetricsPage` asks the others and merges.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.fleet import Fleet, Replies
from monitoring import catalogue as c
from monitoring.catalogue import CATALOGUE, Origin
from monitoring.exposition import Families, Part, PrometheusSink, page
from monitoring.objectives import SERVER_FAULTS

_INGRESS_METRICS = tuple(metric for metric in CATALOGUE if metric.origin is Origin.INGRESS)
_COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
QUESTIONS: Mapping[Origin, str] = {
    Origin.ENGINE: "metrics",
    Origin.INGRESS: "ingress_metrics",
    Origin.AUTOPILOT: "metrics",
}


class IngressMetrics:
    """The count of one ingress process. `decided` is the listener of its router."""

    def __init__(self, name: str = "local") -> None:
        self.name = name
        self.sink = PrometheusSink(_INGRESS_METRICS)
        for code in SERVER_FAULTS:  # a counter that begins to exist at its first event hides that event from `rate`
            self.sink.inc(c.REQUEST_ERRORS, 0.0, code=code)
        self.in_flight = 0  # completion requests

    def decided(self, reason: str, duration_s: float) -> None:
        """The router made a decision."""
        self.sink.inc(c.AFFINITY_DECISIONS, reason=reason)
        self.sink.observe(c.AFFINITY_TIME, duration_s)

    def failed(self, code: str) -> None:
        """An error went out, as an answer or as a stream's last event."""
        self.sink.inc(c.REQUEST_ERRORS, code=code)

    def families(self) -> Families:
        """Everything counted so far."""
        return self.sink.families()


class RequestCounter:
    """ASGI layer: counts requests, statuses and the time to the first byte. Never holds anything up."""

    def __init__(self, app: ASGIApp, *, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._sink = metrics.sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status, has_begun = time.perf_counter(), 0, False

        async def counting_send(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not has_begun and message.get("body"):
                has_begun = True
                if status == 200 and scope["path"] in _COMPLETIONS:
                    self._sink.observe(c.REQUEST_TTFB, time.perf_counter() - began_s)
            await send(message)

        is_completion = scope["path"] in _COMPLETIONS
        self._count_in_flight(int(is_completion))
        try:
            await self._app(scope, receive, counting_send)
        finally:
            self._count_in_flight(-int(is_completion))
            self._sink.inc(c.REQUESTS, route=_route(scope), status=str(status or 499))  # 499: gone before an answer

    def _count_in_flight(self, change: int) -> None:
        self._metrics.in_flight += change
        self._sink.set(c.REQUESTS_IN_FLIGHT, self._metrics.in_flight)


class MetricsPage:
    """The page of the whole application, as one ingress sees it."""

    def __init__(self, own: IngressMetrics, others: Sequence[tuple[Origin, Fleet]]) -> None:
        """`others`: whom to ask, by what they are. Where no ingress is among them, the own count stands for all."""
        self._own = own
        self._others = tuple(others)

    async def render(self) -> bytes:
        """The text page."""
        return page(await self.parts())

    async def parts(self) -> list[Part]:
        """What every process counted, asked side by side."""
        asked = [fleet.ask(QUESTIONS[origin]) for origin, fleet in self._others]
        replies: list[Replies[Any]] = await asyncio.gather(*asked)
        self._own.sink.set(c.REPLICAS_SILENT, sum(len(reply.silent) for reply in replies))
        parts = [
            Part(origin, name, families)
            for (origin, _), reply in zip(self._others, replies, strict=True)
            for name, families in reply.by_replica.items()
            if not (origin is Origin.INGRESS and name == self._own.name)
        ]
        return [*parts, Part(Origin.INGRESS, self._own.name, self._own.families())]


def _route(scope: Scope) -> str:
    """The route's pattern, so that names in paths make no series of their own."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
