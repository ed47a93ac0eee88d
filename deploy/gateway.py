"""Hops 1 and 12 of one completion request: parse, name the session, send the call to its replica, and stream what comes back.

The status is chosen when the first bytes of the answer are there: until then a refusal is an HTTP error, and a replica that goes away is
replaced by another, once, because the request carries the whole dialogue. After that a failure is the stream's last event. Knows Ray
only as a `Fleet`, and no routes.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deploy.calls import Accepted, Item, Refusal, Spent, TurnCall
from deploy.errors import BodyTooLarge, ReplicaLost, TimedOut, code_of, error_event
from deploy.fleet import Fleet
from deploy.identity import affinity_key, identify, in_tenant
from deploy.inventory import Inventory
from deploy.keys import Caller
from deploy.limits import Admission, Limiter, with_max_tokens
from deploy.metrics_page import IngressMetrics
from deploy.protocol import CompletionCall, Endpoint, parse_chat, parse_text
from deploy.settings import DeploySettings
from deploy.waits import Patience
from deploy.waking import Autopilots
from loopserve.errors import LoopServeError
from monitoring.catalogue import REQUEST_RETRIES
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


class Refused(Exception):
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
    """Answers completion requests; one per ingress process."""

    def __init__(
        self,
        fleet: Fleet,
        settings: DeploySettings,
        *,
        metrics: IngressMetrics,
        routed_headers: frozenset[str] | None = None,
        inventory: Inventory,
        autopilots: Autopilots,
        tracing: Tracing | None = None,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._routed_headers = routed_headers
        self._inventory = inventory
        self._autopilots = autopilots
        self._tracing = tracing
        self._limiter = Limiter(num_processes=settings.num_doors)

    async def complete(self, request: Request, endpoint: Endpoint, caller: Caller) -> Response:
        """Answer one completion request, as a stream or whole. Raises errors of the tree."""
        body = await _read(request, self._settings.body_bytes_max)
        parse = parse_chat if endpoint is Endpoint.CHAT else parse_text
        parsed = with_max_tokens(parse(body, branches_max=self._settings.branches_max), caller.limits)
        await self._autopilots.find_replica()
        await self._inventory.check_model(parsed.model)
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
            except Refused as refused:
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
            raise Refused(accepted)
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
