"""Where readings come from: one query to Prometheus, or one question to all replicas. Judges nothing: `signals.trusted` does.

Every read ends within the settings' limit and is bounded in size; what cannot be read at all is `Untrusted` with cause `source`.
"""

import asyncio
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Cause, Reading, Untrusted
from deploy.calls import ReplicaSignals
from deploy.fleet import Fleet
from monitoring import catalogue as c

_ANSWER_BYTES_MAX = 16 << 20  # 20,000 series or so
_TOKEN_BYTES_MAX = 64 << 10
_FULL = "full"  # the demand's label for all tokens

_PLAIN = {
    c.KV_CAPACITY.name: "capacity_bytes",
    c.TURNS_RUNNING.name: "num_running",
    c.TURNS_WAITING.name: "num_waiting",
    c.TURNS_MAX.name: "max_running",
    c.BUDGET_CEILING.name: "ceiling",
    c.BUDGET_FLOOR.name: "budget_floor_tokens",
    c.BUDGET_MAX.name: "budget_max_tokens",
    c.REPLICA_UP.name: "up",
}
_KINDS = {"device": ("active", "warm", "shared"), "host": ("active", "warm", "shared", "cached", "free")}  # by tier
_NAMES = (*_PLAIN, c.KV_BYTES.name, c.KV_DEMAND.name, c.COMPACT_ABOVE.name)


class SignalSource(Protocol):
    """Reads the fleet."""

    async def read(self) -> Reading:
        """What is known now. Raises Untrusted."""

    async def close(self) -> None:
        """Give back what is held."""


class ReplicaSource:
    """The replicas themselves, asked side by side."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def read(self) -> Reading:
        """See `SignalSource`."""
        try:
            replies = await self._fleet.ask("signals")
        except Exception as error:  # Ray's errors have no common root
            raise Untrusted(Cause.SOURCE, f"the replicas cannot be asked: {_said(error)}") from error
        known = {name: told for name, told in replies.by_replica.items() if isinstance(told, ReplicaSignals)}
        rejected = {
            name: Untrusted(Cause.ABSURD, f"answered with {type(told).__name__}")
            for name, told in replies.by_replica.items()
            if name not in known
        }
        return Reading(tuple(known.values()), rejected)

    async def close(self) -> None:
        """Nothing is held."""


class PrometheusSource:
    """One instant query with a range selector: every series with the times of its samples, all as of one moment.

    A target's page is scraped at once, so its samples share one time: a series that is missing in its target's newest page has ended,
    and its replica is gone. A target that is gone itself ages.
    """

    def __init__(
        self,
        settings: AutopilotSettings,
        *,
        environ: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = settings
        self._environ = os.environ if environ is None else environ
        self._client = httpx.AsyncClient(
            timeout=settings.source_timeout_s, trust_env=False, follow_redirects=False, transport=transport
        )

    @property
    def query(self) -> str:
        """The one query."""
        names = "|".join(self._settings.prometheus_prefix + name for name in _NAMES)
        matchers = f'__name__=~"{names}"'
        if self._settings.prometheus_matchers:
            matchers += f",{self._settings.prometheus_matchers}"
        return f"{{{matchers}}}[{math.ceil(self._settings.snapshot_age_max_s)}s]"

    async def read(self) -> Reading:
        """See `SignalSource`."""
        try:
            async with asyncio.timeout(self._settings.source_timeout_s):
                body = await self._ask()
        except TimeoutError as error:
            limit_s = self._settings.source_timeout_s
            raise Untrusted(Cause.SOURCE, f"Prometheus did not answer within {limit_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Untrusted(Cause.SOURCE, f"Prometheus cannot be asked: {_said(error)}") from error
        prefix = self._settings.prometheus_prefix
        try:
            return reading_of(_samples(body, prefix))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise Untrusted(Cause.SOURCE, f"Prometheus' answer is no matrix of samples: {_said(error)}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self) -> bytes:
        url = f"{self._settings.prometheus_url.rstrip('/')}/api/v1/query"
        headers = {"authorization": f"Bearer {token}"} if (token := self._token()) else {}
        async with self._client.stream("POST", url, data={"query": self.query}, headers=headers) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > _ANSWER_BYTES_MAX:
                    raise Untrusted(Cause.SOURCE, f"Prometheus' answer is longer than {_ANSWER_BYTES_MAX} bytes")
                parts.append(part)
            if response.status_code != 200:
                said = b"".join(parts)[:200].decode("utf-8", "replace")
                raise Untrusted(Cause.SOURCE, f"Prometheus answered {response.status_code}: {said}")
            return b"".join(parts)

    def _token(self) -> str:
        """The bearer token; "" where none is wanted. Read anew for every query, because files of tokens are renewed."""
        path = self._settings.prometheus_token_file
        if path:
            try:
                with Path(path).open("rb") as file:
                    return file.read(_TOKEN_BYTES_MAX).decode().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise Untrusted(Cause.SOURCE, f"prometheus_token_file cannot be read: {_said(error)}") from error
        return self._environ.get(self._settings.prometheus_token_env, "") if self._settings.prometheus_token_env else ""


@dataclass(frozen=True, slots=True)
class Sample:
    """The newest sample of one series."""

    name: str  # as in the catalogue
    labels: Mapping[str, str]
    unix_time: float
    value: float

    @property
    def target(self) -> str:
        """What was scraped."""
        return f"{self.labels.get('job', '')}/{self.labels.get('instance', '')}"


def reading_of(samples: list[Sample]) -> Reading:
    """Replicas out of samples: of each, the page that is newest. Raises ValueError for what is no sample of ours."""
    newest: dict[str, float] = {}
    for sample in samples:
        newest[sample.target] = max(newest.get(sample.target, -math.inf), sample.unix_time)
    by_page: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        if sample.unix_time == newest[sample.target] and c.Origin.ENGINE.value in sample.labels:
            pages = by_page.setdefault(sample.labels[c.Origin.ENGINE.value], {})
            pages.setdefault(sample.target, []).append(sample)
    replicas: list[ReplicaSignals] = []
    rejected: dict[str, Untrusted] = {}
    for replica, pages in by_page.items():
        page = max(pages.values(), key=lambda samples: samples[0].unix_time)  # several ingresses show the same replica
        try:
            replicas.append(_signals(replica, page))
        except Untrusted as untrusted:
            rejected[replica] = untrusted
    return Reading(tuple(replicas), rejected)


def _samples(body: bytes, prefix: str) -> list[Sample]:
    """The newest sample of every series of an answer. Raises ValueError, TypeError, LookupError or AttributeError for anything else."""
    answer: Any = json.loads(body)
    if answer["status"] != "success" or answer["data"]["resultType"] != "matrix":
        raise ValueError(f"status {answer['status']!r}")
    found = []
    for series in answer["data"]["result"]:
        labels = {str(name): str(text) for name, text in series["metric"].items()}
        unix_time, value = max(series["values"], key=lambda pair: float(pair[0]))
        found.append(Sample(labels.pop("__name__").removeprefix(prefix), labels, float(unix_time), float(value)))
    return found


def _signals(replica: str, samples: list[Sample]) -> ReplicaSignals:
    """One replica's page as its record. Raises Untrusted where a series is missing or is no number."""
    plain: dict[str, int] = {}
    kinds: dict[tuple[str, str], int] = {}
    curve: dict[str, dict[str, int]] = {}
    compact_above_ratio: float | None = None
    for sample in samples:
        value = _whole(sample)
        if sample.name in _PLAIN:
            plain[_PLAIN[sample.name]] = value
        elif sample.name == c.KV_BYTES.name:
            kinds[sample.labels.get("tier", ""), sample.labels.get("kind", "")] = value
        elif sample.name == c.COMPACT_ABOVE.name:
            compact_above_ratio = sample.value
        elif sample.name == c.KV_DEMAND.name:
            curve.setdefault(sample.labels.get("budget_tokens", ""), {})[sample.labels.get("state", "")] = value
    wanted_kinds = {(tier, kind) for tier, names in _KINDS.items() for kind in names}
    missing = sorted({*_PLAIN.values()} - plain.keys()) + sorted(map(" ".join, wanted_kinds - kinds.keys()))
    if missing or not curve:
        raise Untrusted(Cause.MISSING, f"no series for {', '.join(missing) or 'the demand curve'}")
    if compact_above_ratio is None:
        raise Untrusted(Cause.MISSING, "no series that says when turns go compact")
    ceiling = plain["ceiling"]
    return ReplicaSignals(
        replica=replica,
        unix_time=samples[0].unix_time,
        accepting=plain["up"] == 1,
        capacity_bytes=plain["capacity_bytes"],
        active_bytes=kinds["device", "active"],
        warm_bytes=kinds["device", "warm"],
        shared_bytes=kinds["device", "shared"],
        demand=_demand(curve),
        num_running=plain["num_running"],
        num_waiting=plain["num_waiting"],
        max_running=plain["max_running"],
        budget_ceiling_tokens=None if ceiling >= plain["budget_max_tokens"] else ceiling,
        budget_max_tokens=plain["budget_max_tokens"],
        budget_floor_tokens=plain["budget_floor_tokens"],
        compact_above_ratio=compact_above_ratio,
        host_capacity_bytes=sum(kinds["host", kind] for kind in _KINDS["host"]),
        host_live_bytes=kinds["host", "active"] + kinds["host", "shared"],
        host_warm_bytes=kinds["host", "warm"],
    )


def _demand(curve: Mapping[str, Mapping[str, int]]) -> tuple[tuple[int | None, int, int], ...]:
    """A demand curve, smallest budget first, all tokens last. Raises Untrusted."""
    order: Callable[[str], float] = lambda label: math.inf if label == _FULL else float(label)  # noqa: E731, a key
    try:
        labels = sorted(curve, key=order)
        return tuple(
            (None if label == _FULL else int(label), curve[label]["active"], curve[label]["warm"]) for label in labels
        )
    except (KeyError, ValueError) as error:
        raise Untrusted(Cause.MISSING, f"the demand curve has a gap: {_said(error)}") from error


def _whole(sample: Sample) -> int:
    if not math.isfinite(sample.value):
        raise Untrusted(Cause.ABSURD, f"{sample.name} is {sample.value}")
    return round(sample.value)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__
