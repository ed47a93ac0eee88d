"""The routes of the live page: its files, and the one JSON route that it asks every second. Knows no Ray and no engine.

    GET /observe               the page
    GET /observe/static/NAME   its style and its modules
    GET /observe/state         the fleet now, and every point after `since`; for operators

The files hold no data and need no key; what they show does. Everything comes from this server; the browser is told to allow nothing
else.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from deploy.fleet import Fleet
from deploy.keys import Caller
from deploy.observe.counting import Sample
from deploy.observe.history import PrometheusHistory
from deploy.observe.watcher import Watcher
from deploy.settings import DeploySettings
from loopserve.errors import InvalidRequest, NotFound
from monitoring.exposition import Part

CONVERSATIONS_MAX = 200  # of one replica, those used last
DECISIONS_MAX = 30

_VIEW = ("id", "num_tokens", "num_cached_tokens", "num_turns", "is_active", "idle_s")
_STATIC = Path(__file__).parent / "static"
_PAGE = "observe.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Conversations(Protocol):
    """Gives a tenant's conversations: the body of `/v1/sessions`."""

    def __call__(self, tenant: str, /) -> Awaitable[Mapping[str, Any]]:
        """All of them, those used last first."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the page's data comes from."""

    watcher: Watcher
    conversations: Conversations
    autopilot: Callable[[], Awaitable[Mapping[str, Any] | None]]  # of what `/v1/autopilot` says; None without one


def observe_router(sources: Sources, operator: Callable[[Request], Awaitable[Caller]]) -> APIRouter:
    """The routes. `operator` lets operators in and says who they are."""
    files = dict(_files())
    router = APIRouter()
    Operator = Annotated[Caller, Depends(operator)]  # noqa: N806, a type

    @router.get("/observe")
    async def page() -> Response:
        return files[_PAGE]()

    @router.get("/observe/static/{name}")
    async def static(name: str) -> Response:
        if name not in files:
            raise NotFound(f"The page has no file {name!r}.")
        return files[name]()

    @router.get("/observe/state")
    async def state(caller: Operator, since: str = "0") -> Response:
        fleet, conversations, autopilot = await _side_by_side(
            sources.watcher.state(_unix_time(since)), sources.conversations(caller.tenant), sources.autopilot()
        )
        body = {**fleet, **_shown(conversations), "autopilot": autopilot}
        return JSONResponse(_finite(body), headers={**_SECURITY, "cache-control": "no-store"})

    return router


def sources_of(
    settings: DeploySettings,
    parts: Callable[[], Awaitable[Sequence[Part]]],
    conversations: Conversations,
    autopilot: Fleet | None,
) -> Sources:
    """The page's data out of what the ingress has. `parts` are those of its metrics page; a Prometheus tells the past."""

    async def read() -> list[Sample]:
        return samples_of(await parts())

    async def overview() -> Mapping[str, Any] | None:
        replies = {} if autopilot is None else (await autopilot.ask("overview")).by_replica
        return next((_pilot(told) for told in replies.values()), None)

    return Sources(Watcher(read, PrometheusHistory.of(settings.autopilot)), conversations, overview)


def samples_of(parts: Sequence[Part]) -> list[Sample]:
    """The samples that the metrics page would show, without writing and parsing it."""
    return [
        Sample(sample.name, {part.origin.value: part.name, **sample.labels}, sample.value)
        for part in parts
        for family in part.families
        for sample in family.samples
    ]


def _files() -> Iterator[tuple[str, Callable[[], Response]]]:
    """Each file of the page, read once, by its name."""

    def answer(content: bytes, media_type: str) -> Callable[[], Response]:
        return lambda: Response(content, media_type=media_type, headers={**_SECURITY, "cache-control": "no-cache"})

    for path in sorted(_STATIC.iterdir()):
        if path.suffix in _MEDIA_TYPES:
            yield path.name, answer(path.read_bytes(), _MEDIA_TYPES[path.suffix])


async def _side_by_side(*questions: Awaitable[Any]) -> list[Any]:
    """All answers, in order. Not on behalf of one request: Serve would take questions with the same request id for one another's."""

    async def answer(question: Awaitable[Any]) -> Any:
        return await question

    return await asyncio.gather(*(asyncio.create_task(answer(question), context=Context()) for question in questions))


def _unix_time(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"since is {text[:40]!r}; unix seconds are needed, or nothing", param="since")
    return value


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """Conversations by the replica that holds KV of them, the newest few and how many there are; and the replicas that said nothing."""
    by_replica: dict[str, dict[str, Any]] = {}
    for view in found["data"]:
        if view["is_active"] or view["num_cached_tokens"]:
            home = by_replica.setdefault(view["replica"], {"num": 0, "shown": []})
            home["num"] += 1
            if home["num"] <= CONVERSATIONS_MAX:
                home["shown"].append({name: view[name] for name in _VIEW})
    return {"conversations": by_replica, "silent": found["silent"]}


def _pilot(overview: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of `/v1/autopilot`."""
    shown = {name: overview[name] for name in ("mode", "holding", "last")}
    return {**shown, "decisions": overview["decisions"][:DECISIONS_MAX]}


def _finite(value: Any) -> Any:
    """JSON has no infinity: such a number is told as unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
