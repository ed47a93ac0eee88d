"""What Prometheus remembers of the metrics that the page is made of. Knows its HTTP API, and nothing of pages.

Trouble with Prometheus is no trouble of the page's: it then begins where it was opened. The reason is logged once.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from deploy.autopilot.settings import AutopilotSettings
from deploy.observe.counting import Sample
from deploy.observe.state import LABELS, WATCHED_SERIES

STEP_S = 2.0
ANSWER_S_MAX = 3.0
ANSWER_BYTES_MAX = 32 << 20  # about 100 replicas; a larger fleet's page begins where it was opened
_log = logging.getLogger(__name__)


class PrometheusHistory:
    """The watched series of one Prometheus."""

    def __init__(
        self,
        url: str,
        *,
        matchers: str = "",
        token: Callable[[], str] = str,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`url` is its root, `matchers` further PromQL ones, `token` gives a bearer token or "". `transport` stands in for the network."""
        self._url = url.rstrip("/")
        self._query = "{" + ",".join(filter(None, (f'__name__=~"{"|".join(sorted(WATCHED_SERIES))}"', matchers))) + "}"
        self._token = token
        self._transport = transport
        self._failure = ""

    @classmethod
    def of(cls, settings: AutopilotSettings) -> Self | None:
        """The autopilot's Prometheus. None without one, and where it knows the series by Ray's names only."""
        if not settings.prometheus_url or settings.prometheus_prefix:
            return None

        def token() -> str:
            if settings.prometheus_token_file:
                return Path(settings.prometheus_token_file).read_text(encoding="utf-8").strip()
            return os.environ.get(settings.prometheus_token_env, "")

        return cls(settings.prometheus_url, matchers=settings.prometheus_matchers, token=token)

    async def between(self, start_s: float, end_s: float) -> Sequence[tuple[float, Sequence[Sample]]]:
        """Samples by unix time, oldest first, one time every `STEP_S`; empty where there is no answer."""
        if end_s <= start_s:
            return []
        form = {"query": self._query, "start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{STEP_S:g}"}
        try:
            return by_time(await self._ask(form))
        except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError) as error:
            failure = f"{type(error).__name__}: {error}"
            if failure != self._failure:
                _log.warning("Prometheus at %s does not tell the past: %s", self._url, failure)
            self._failure = failure
            return []

    async def _ask(self, form: dict[str, str]) -> Any:
        token = self._token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        async with (
            httpx.AsyncClient(timeout=ANSWER_S_MAX, trust_env=False, transport=self._transport) as http,
            http.stream("POST", f"{self._url}/api/v1/query_range", data=form, headers=headers) as response,
        ):
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > ANSWER_BYTES_MAX:
                    raise ValueError(f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
                parts.append(part)
            response.raise_for_status()
        return httpx.Response(200, content=b"".join(parts)).json()


def by_time(answer: Any) -> list[tuple[float, list[Sample]]]:
    """A range query's answer as samples by time. Labels that scraping adds are dropped; of what several targets tell, the most counts.

    Raises ValueError, LookupError or TypeError where it is no such answer.
    """
    moments: dict[float, dict[tuple[str, frozenset[tuple[str, str]]], float]] = {}
    for series in answer["data"]["result"]:
        labels = frozenset((name, value) for name, value in series["metric"].items() if name in LABELS)
        key = (series["metric"]["__name__"], labels)
        for at, text in series["values"]:
            samples = moments.setdefault(float(at), {})
            samples[key] = max(float(text), samples.get(key, float("-inf")))
    return [
        (at, [Sample(name, dict(labels), value) for (name, labels), value in samples.items()])
        for at, samples in sorted(moments.items())
    ]
