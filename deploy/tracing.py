"""Where a request's trace begins and is handed on: a middleware around the routes, a fleet around the fleet. Hops 1 and 2 of a turn.

Both exist only where tracing is on, so a request that is not traced passes through neither. What a span is, `monitoring.tracing` knows.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.calls import Accepted, Item, TurnCall, engine_session_id
from deploy.errors import ReplicaLost
from deploy.fleet import Fleet, Replies
from monitoring.tracing import Tracing, session_hash
from router.affinity import AffinityKey

_TRACED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class TracedRequests:
    """ASGI middleware: the span `ingress` around every completion request, from its headers to the last byte of the answer."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and watch what is sent."""
        if scope["type"] != "http" or scope["path"] not in _TRACED_PATHS:
            await self._app(scope, receive, send)
            return
        is_sent = False

        async def watched(message: Message) -> None:
            nonlocal is_sent
            if message["type"] == "http.response.start":
                self._tracing.note_status(message["status"])
            await send(message)
            is_sent = message["type"] == "http.response.body" and not message.get("more_body", False)

        attributes = {"http.request.method": scope["method"], "http.route": scope["path"]}
        with self._tracing.request(*_trace_headers(scope), attributes):
            try:
                await self._app(scope, receive, watched)
            except Exception as error:
                self._tracing.fail(type(error).__name__)
                raise
            finally:
                if not is_sent:
                    self._tracing.note(cut_short=True)  # the client went away, or an error above


class TracedFleet:
    """A fleet whose calls carry the trace on. Makes the span `router` of every call that a replica got, or that was lost on the way."""

    def __init__(self, fleet: Fleet, tracing: Tracing, *, routes: bool) -> None:
        """`routes` False: `fleet` answers in this process, somebody else has chosen it."""
        self._fleet = fleet
        self._tracing = tracing
        self._routes = routes

    async def open(self, call: TurnCall, key: AffinityKey) -> AsyncGenerator[Item, None]:
        """See `Fleet.open`."""
        parent, begin_ns = self._tracing.here(), time.time_ns()
        is_routed = False
        try:
            async with aclosing(self._fleet.open(replace(call, trace_parent=parent), key)) as items:
                async for item in items:
                    if isinstance(item, Accepted):
                        is_routed = True
                        self._accepted(call, item, parent, begin_ns)
                    yield item
        except ReplicaLost as lost:
            if self._routes and parent and not is_routed:
                self._add_router_span(parent, begin_ns, time.time_ns(), replica=lost.replica, error="replica_lost")
            raise

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        """See `Fleet.ask`."""
        return await self._fleet.ask(question, *args)

    def _accepted(self, call: TurnCall, accepted: Accepted, parent: str, begin_ns: int) -> None:
        session = session_hash(engine_session_id(call.tenant, accepted.session_name))
        self._tracing.note(session=session, replica=accepted.replica, cached_tokens=accepted.cached_tokens)
        if self._routes and parent:
            end_ns = round(accepted.received_unix_s * 1e9)
            self._add_router_span(parent, begin_ns, end_ns, replica=accepted.replica)

    def _add_router_span(self, parent: str, begin_ns: int, end_ns: int, *, replica: str, error: str = "") -> None:
        self._tracing.add_span(
            "router",
            parent=parent,
            start_ns=begin_ns,
            end_ns=end_ns,
            attributes={"loopserve.replica": replica},
            error=error,
        )


def _trace_headers(scope: Scope) -> tuple[str, str]:
    """`traceparent` and `tracestate` of the request; two of one name mean none, as the specification has it for the first."""

    def only(wanted: bytes) -> str:
        values = [value for name, value in scope["headers"] if name == wanted]
        return values[0].decode("latin-1") if len(values) == 1 else ""

    return only(b"traceparent"), only(b"tracestate")
