"""Hop 1 and 12: the HTTP surface. Parses, names the session, sends the call to its replica, and streams what comes back.

The status is chosen when the first bytes of the answer are there: until then a refusal is an HTTP error, and a replica that goes away is
replaced by another, once, because the request carries the whole dialogue. After that a failure is the stream's last event. Knows Ray
only as a `Fleet`.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from deploy.calls import Accepted, Item, Refusal, ReplicaStatus, SessionView, Spent, TurnCall
from deploy.doors import Doors
from deploy.errors import (
    BodyTooLarge,
    ErrorAnswer,
    MethodNotAllowed,
    ModelNotFound,
    ReplicaLost,
    TimedOut,
    code_of,
    error_answer,
    error_event,
)
from deploy.fleet import Fleet, Replies
from deploy.identity import affinity_key, identify, in_tenant
from deploy.keys import Caller
from deploy.limits import Admission, Limiter, with_max_tokens
from deploy.metrics_page import IngressMetrics, MetricsPage, RequestCounter
from deploy.observe.page import observe_router, sources_of
from deploy.protocol import CompletionCall, Endpoint, parse_chat, parse_text
from deploy.settings import DeploySettings
from deploy.tracing import TracedFleet, TracedRequests
from deploy.waits import Patience
from deploy.waking import Autopilots
from loopserve.errors import EngineUnavailable, LoopServeError, NotFound
from monitoring.catalogue import KEYS_RELOAD_FAILED, REQUEST_RETRIES, Origin
from monitoring.exposition import CONTENT_TYPE
from monitoring.tracing import Tracing
from router.affinity import AffinityKey

_log = logging.getLogger(__name__)
_TRIES = 2


@dataclass(frozen=True, slots=True)
class _Opened:
    """An answer that has begun: its first bytes are here, nothing has been sent."""

    accepted: Accepted
    first: bytes
    rest: AsyncGenerator[Item, None]


class _Refused(Exception):
    """A replica's refusal on its way to the client."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class _Stream(StreamingResponse):
    """Events that end their turn however the response ends, even where the client left before the first one was sent."""

    def __init__(
        self, events: AsyncIterator[bytes], opened: _Opened, admission: Admission, *, headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._opened = opened
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._admission.close()
            await self._opened.rest.aclose()


class Gateway:
    """What the routes do; one per ingress process."""

    def __init__(
        self,
        fleet: Fleet,
        settings: DeploySettings,
        *,
        metrics: IngressMetrics,
        routed_headers: frozenset[str] | None = None,
        autopilots: Autopilots,
        tracing: Tracing | None = None,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._routed_headers = routed_headers
        self._autopilots = autopilots
        self._tracing = tracing
        self._limiter = Limiter(num_processes=settings.num_doors)
        self._model = ""  # asked for once: it does not change while the application lives

    async def complete(self, request: Request, endpoint: Endpoint, caller: Caller) -> Response:
        """Answer one completion request, as a stream or whole. Raises errors of the tree."""
        body = await _read(request, self._settings.body_bytes_max)
        parse = parse_chat if endpoint is Endpoint.CHAT else parse_text
        parsed = with_max_tokens(parse(body, branches_max=self._settings.branches_max), caller.limits)
        await self._autopilots.find_replica()
        await self._check_model(parsed.model)
        call, key = self._call(parsed, request, caller)
        admission = self._limiter.admit(caller, parsed)
        try:
            opened = await self._open(call, key, admission)
            if not parsed.stream:
                await self._come_to_the_end(opened, admission)
        except BaseException as error:
            if isinstance(error, Exception):  # else the client is gone: what it had computed is charged
                admission.refund()
            admission.close()
            raise
        headers = {"x-session-id": opened.accepted.session_name, "x-loopserve-replica": opened.accepted.replica}
        if not parsed.stream:
            admission.close()
            headers |= admission.headers()
            return Response(opened.first, media_type="application/json", headers=headers)
        headers |= admission.headers()
        headers["cache-control"] = "no-cache"
        headers["x-accel-buffering"] = "no"  # reverse proxies must not collect events
        return _Stream(self._events(opened, admission), opened, admission, headers=headers)

    async def models(self) -> list[dict[str, Any]]:
        """OpenAI's model objects: one, or none while nothing is loaded."""
        replies: Replies[ReplicaStatus] = await self._fleet.ask("status")
        by_model = {status.model: status for status in replies.by_replica.values()}
        return [
            {
                "id": name,
                "object": "model",
                "created": status.loaded_at,
                "owned_by": "loopserve",
                "max_model_len": status.max_session_tokens,
            }
            for name, status in by_model.items()
        ]

    async def ready(self) -> dict[str, Any]:
        """Which replicas can answer, and with what; a fleet asleep is ready, too. Raises EngineUnavailable where none can."""
        replies: Replies[ReplicaStatus] = await self._fleet.ask("status")
        alive = {status.replica: status.model for status in replies.by_replica.values() if status.alive}
        if not alive and await self._autopilots.is_asleep():
            return {"status": "asleep", "models": [self._model] if self._model else [], "replicas": [], "silent": []}
        if not alive:
            raise EngineUnavailable("No replica has loaded the model yet; try again shortly.")
        models = sorted(set(alive.values()))
        return {"status": "ready", "models": models, "replicas": sorted(alive), "silent": list(replies.silent)}

    async def sessions(self, tenant: str) -> dict[str, Any]:
        """Every session of a tenant on every replica that answers."""
        replies: Replies[tuple[SessionView, ...]] = await self._fleet.ask("sessions", tenant)
        found = [asdict(view) for views in replies.by_replica.values() for view in views]
        found.sort(key=lambda view: view["idle_s"])
        return {"object": "list", "data": found, "silent": list(replies.silent)}

    async def session(self, tenant: str, name: str) -> dict[str, Any]:
        """One session wherever it is; a moved one may be on several replicas, the freshest is the answer. Raises NotFound."""
        replies: Replies[SessionView | None] = await self._fleet.ask("session", tenant, name)
        found = sorted((view for view in replies.by_replica.values() if view), key=lambda view: view.idle_s)
        if not found:
            raise _absent(name, replies.silent)
        return {"object": "session", **asdict(found[0]), "silent": list(replies.silent)}

    async def release(self, tenant: str, name: str) -> dict[str, Any]:
        """Forget one session wherever it is. Raises NotFound, or EngineUnavailable where a silent replica may hold it."""
        replies: Replies[bool] = await self._fleet.ask("release", tenant, name)
        released = sorted(replica for replica, was_there in replies.by_replica.items() if was_there)
        if not released:
            raise _absent(name, replies.silent)
        silent = list(replies.silent)
        return {"id": name, "object": "session.deleted", "deleted": True, "replicas": released, "silent": silent}

    async def _check_model(self, model: str) -> None:
        if not self._model:
            self._model = next((str(found["id"]) for found in await self.models()), "")
        if not self._model:
            raise EngineUnavailable("No replica has loaded the model yet; try again shortly.")
        if model != self._model:
            raise ModelNotFound(f"The model {model!r} is not served here; {self._model!r} is.", param="model")

    def _call(self, parsed: CompletionCall, request: Request, caller: Caller) -> tuple[TurnCall, AffinityKey]:
        """The call, and the key by which it is placed. Where routers see few headers, placement goes by these alone."""
        own = placed = identify(parsed, request.headers, in_tenant(caller.tenant, parsed.cache_salt))
        if self._routed_headers is not None:
            seen = {name: text for name, text in request.headers.items() if name in self._routed_headers}
            placed = identify(parsed, seen, in_tenant("", parsed.cache_salt))
        kind = "chatcmpl" if parsed.endpoint is Endpoint.CHAT else "cmpl"
        call = TurnCall(
            request=parsed,
            tenant=own.tenant,
            session_name=own.session_name,
            home=placed.home,
            continuation=own.continuation,
            response_id=f"{kind}-{secrets.token_hex(16)}",
            created=int(time.time()),
            placed_in=placed.tenant,
        )
        return call, affinity_key(parsed, placed)

    async def _open(self, call: TurnCall, key: AffinityKey, admission: Admission) -> _Opened:
        """Wait for the first bytes; a replica that goes away or whose engine is dead before that is replaced once."""
        for remaining in range(_TRIES - 1, -1, -1):
            items = self._fleet.open(call, key)
            try:
                return await self._begun(items, admission)
            except _Refused as refused:
                await items.aclose()
                if not (refused.refusal.elsewhere and remaining):
                    raise
                key = replace(key, avoid=refused.refusal.replica)
                self._metrics.sink.inc(REQUEST_RETRIES)
            except ReplicaLost as lost:
                if not remaining:
                    raise
                key = replace(key, avoid=lost.replica)
                self._metrics.sink.inc(REQUEST_RETRIES)
            except BaseException:
                await items.aclose()
                raise
        raise AssertionError("every try returns or raises")

    async def _begun(self, items: AsyncGenerator[Item, None], admission: Admission) -> _Opened:
        accepted = await _next(items, self._settings.admission_timeout_s, "No place in the batch came free")
        if isinstance(accepted, Accepted):
            self._autopilots.met()
            admission.accept(accepted.prompt_tokens)
            first = await _next(items, self._settings.idle_timeout_s, "No part of the answer came")
            if isinstance(first, bytes):
                return _Opened(accepted, first, items)
            accepted = first
        if isinstance(accepted, Refusal):
            raise _Refused(accepted)
        raise LoopServeError("the replica ended without an answer")

    async def _come_to_the_end(self, opened: _Opened, admission: Admission) -> None:
        """The whole answer is here; let the replica come to its end instead of cancelling it."""
        with suppress(LoopServeError):
            while (
                item := await _next(opened.rest, self._settings.ask_timeout_s, "No end of the answer came")
            ) is not None:
                if isinstance(item, Spent):
                    admission.finish(item.generated_tokens)
        await opened.rest.aclose()

    async def _events(self, opened: _Opened, admission: Admission) -> AsyncIterator[bytes]:
        """The stream after its status: bytes as they come, or one error event as the last."""
        items = Patience(opened.rest, self._settings.idle_timeout_s, "No further part of the answer came")
        try:
            admission.forward(opened.first)
            yield opened.first
            while (item := await items.next()) is not None:
                if isinstance(item, bytes):
                    admission.forward(item)
                    yield item
                else:
                    assert isinstance(item, Spent), item
                    admission.finish(item.generated_tokens)
        except Exception as error:  # the status is out; the client must learn of any failure inside the stream
            if not isinstance(error, LoopServeError):
                _log.exception("a stream failed")
            self._metrics.failed(code_of(error))
            if self._tracing is not None:
                self._tracing.fail(code_of(error))
            yield error_event(error)
        finally:
            items.close()
            await opened.rest.aclose()


def build_api(
    fleet: Fleet,
    settings: DeploySettings,
    *,
    routed_headers: frozenset[str] | None = None,
    metrics: IngressMetrics | None = None,
    peers: Sequence[tuple[Origin, Fleet]] = (),
    tracing: Tracing | None = None,
) -> FastAPI:
    """The routes over one fleet.

    `routed_headers`: lower-case names of the headers that routers see of a request; None: all. `metrics`: this process's count. `peers`:
    whom to ask for the rest of the metrics page, the other ingresses and the autopilot.
    """
    doors = Doors(settings)
    metrics = metrics or IngressMetrics()
    if tracing is not None:
        fleet = TracedFleet(fleet, tracing, routes=routed_headers is None)
    pilots = next((peer for origin, peer in peers if origin is Origin.AUTOPILOT), None)
    autopilots = Autopilots(fleet, pilots, settings)
    gateway = Gateway(
        fleet, settings, routed_headers=routed_headers, metrics=metrics, autopilots=autopilots, tracing=tracing
    )
    metrics_page = MetricsPage(metrics, [(Origin.ENGINE, fleet), *peers])
    api = FastAPI(
        title="LoopServe", docs_url=None, redoc_url=None, openapi_url=None if settings.keys_file else "/openapi.json"
    )
    api.state.doors = doors
    api.state.metrics_page = metrics_page
    api.add_middleware(RequestCounter, metrics=metrics)
    if tracing is not None:
        api.add_middleware(TracedRequests, tracing=tracing)
    _add_errors(api, metrics)
    User = Annotated[Caller, Depends(doors.user)]  # noqa: N806, a type

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request, caller: User) -> Response:
        return await gateway.complete(request, Endpoint.CHAT, caller)

    @api.post("/v1/completions")
    async def completions(request: Request, caller: User) -> Response:
        return await gateway.complete(request, Endpoint.TEXT, caller)

    @api.get("/v1/models", dependencies=[Depends(doors.user)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await gateway.models()}

    @api.get("/v1/models/{name:path}", dependencies=[Depends(doors.user)])
    async def model(name: str) -> dict[str, Any]:
        for found in await gateway.models():
            if found["id"] == name:
                return found
        raise ModelNotFound(f"The model {name!r} is not served here.", param="model")

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @api.get("/ready")
    async def ready() -> dict[str, Any]:
        return await gateway.ready()

    @api.get("/metrics", dependencies=[Depends(doors.metrics)])
    async def metrics_text() -> Response:
        metrics.sink.set(KEYS_RELOAD_FAILED, float(doors.keys_reload_failed))
        return Response(await metrics_page.render(), media_type=CONTENT_TYPE)

    @api.get("/v1/autopilot", dependencies=[Depends(doors.operator)])
    async def autopilot() -> dict[str, Any]:
        return await autopilots.overview()

    @api.get("/v1/sessions")
    async def sessions(caller: User, cache_salt: str = "") -> dict[str, Any]:
        return await gateway.sessions(in_tenant(caller.tenant, cache_salt))

    @api.get("/v1/sessions/{name:path}")
    async def session(caller: User, name: str, cache_salt: str = "") -> dict[str, Any]:
        return await gateway.session(in_tenant(caller.tenant, cache_salt), name)

    @api.delete("/v1/sessions/{name:path}")
    async def release(caller: User, name: str, cache_salt: str = "") -> dict[str, Any]:
        return await gateway.release(in_tenant(caller.tenant, cache_salt), name)

    if settings.observe:
        sources = sources_of(settings, metrics_page.parts, gateway.sessions, pilots)
        api.include_router(observe_router(sources, doors.operator))
    return api


def _add_errors(api: FastAPI, metrics: IngressMetrics) -> None:
    """Every error leaves in OpenAI's shape, those of the framework included, and is counted."""

    def answered(answer: ErrorAnswer) -> Response:
        metrics.failed(answer.code)
        return Response(answer.body, status_code=answer.status, media_type="application/json", headers=answer.headers)

    async def ours(_: Request, error: Exception) -> Response:
        return answered(error_answer(error))

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, _Refused)
        return answered(error.refusal.answer)

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            return answered(error_answer(MethodNotAllowed(f"{request.method} is not served at {request.url.path}.")))
        return answered(error_answer(NotFound(f"There is nothing at {request.url.path}.")))

    api.add_exception_handler(LoopServeError, ours)
    api.add_exception_handler(_Refused, refused)
    api.add_exception_handler(HTTPException, framework)
    api.add_exception_handler(Exception, ours)


def _absent(name: str, silent: tuple[str, ...]) -> LoopServeError:
    if silent:
        return EngineUnavailable(
            f"The session {name!r} was not found, but {', '.join(silent)} did not answer; try again."
        )
    return NotFound(f"There is no session {name!r}.")


async def _read(request: Request, limit: int) -> bytes:
    """The body, or BodyTooLarge as soon as it is known to be longer than `limit` bytes."""
    message = f"The body is longer than {limit} bytes; shorten the conversation."
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(message)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(message)
        parts.append(part)
    return b"".join(parts)


async def _next(items: AsyncGenerator[Item, None], limit_s: float, what: str) -> Item | None:
    """The next item, None at the end. Raises TimedOut."""
    try:
        async with asyncio.timeout(limit_s):
            return await anext(items, None)
    except TimeoutError as error:
        raise TimedOut(f"{what} within {limit_s:g} s; try again later.") from error
