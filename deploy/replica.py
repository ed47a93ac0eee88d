"""Hop 3: one replica. An engine, its chat service, and what this process knows of its conversations. No Ray in here: see `deploy.app`.

Everything runs on the event loop but the engine, which has its own thread; nothing is computed on the loop. Knows no HTTP but the
bytes that `deploy.answers` writes.

    call -> session name -> ChatService.stream -> AnswerWriter -> Accepted, bytes*        client gone: the generator is closed,
                                                                                         which cancels the turn in the engine
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from deploy.answers import AnswerShape, AnswerWriter
from deploy.autopilot.compact_setting import CompactSetting
from deploy.autopilot.lease import BudgetLease
from deploy.calls import (
    Accepted,
    BudgetOrder,
    BudgetReply,
    Item,
    Refusal,
    ReplicaSignals,
    ReplicaStatus,
    SessionView,
    Spent,
    TurnCall,
    engine_session_id,
    name_in_tenant,
)
from deploy.conversations import Conversations
from deploy.errors import error_answer
from deploy.handoff.arrivals import Arrivals
from deploy.handoff.departures import Departures, Peers
from deploy.handoff.holdings import Doors, Holdings, Imported
from deploy.handoff.records import Standing
from deploy.handoff.stored import StoredPapers
from deploy.load import LoadMeter
from deploy.settings import DeploySettings
from deploy.waits import Pace
from loopserve.chat import AnswerStarted, ChatEvent, ChatRequest
from loopserve.dialogue import Message, SessionId
from loopserve.errors import ConfigError, EngineUnavailable, LoopServeError, NotFound
from loopserve.notes import SessionNotes
from loopserve.sessions import SessionInfo
from loopserve.stats import MemoryStats
from loopserve.transcripts import Transcript
from monitoring.catalogue import AFFINITY_TURNS, REJECTIONS
from monitoring.sinks import Fan, MetricSink
from router.affinity import AffinitySettings, load_from_stats, pack_claims
from router.identity import ConversationKey, continuation_key, generated_session_name, known_part, session_key

_log = logging.getLogger(__name__)
_DEAF_SLACK_S = 60.0  # behind HAProxy a replica that ends waits for up to 30 s before it looks at its turns
_PIECES_BURST_S = 0.02  # a step ends for all turns of a batch at once


class EngineLike(Protocol):
    """What a replica needs of `loopserve.engine.Engine`."""

    @property
    def model_name(self) -> str:
        """Name under which the model is served."""

    max_session_tokens: int

    def start(self) -> None:
        """Start the engine thread."""

    def stop(self) -> None:
        """End every turn and the thread."""

    def is_alive(self) -> bool:
        """Whether turns make progress."""

    def sessions(self) -> tuple[SessionInfo, ...]:
        """Every session."""

    def session(self, session_id: SessionId) -> SessionInfo:
        """One session. Raises NotFound."""

    def release(self, session_id: SessionId, *, cache_salt: str | None = None) -> None:
        """Forget a session; with its salt also one that lies on disk only. Raises NotFound."""

    def export_session(self, session_id: SessionId) -> bytes:
        """The image of an idle session. Raises NotFound, Overloaded while a turn of it is there, EngineUnavailable."""

    def import_session(self, data: bytes) -> Imported:
        """Take a session over. Raises where its image is refused or has no room."""

    def memory(self) -> MemoryStats:
        """Queues, pool and demand, counted now."""

    def set_budget(self, tokens: int | None) -> None:
        """Set or lift the ceiling of the token selections. Raises ConfigError."""

    def keep_notes(self, notes: SessionNotes) -> None:
        """Keep notes beside the sessions on disk, and tell of those that lie there."""

    def set_compact_above(self, ratio: float) -> None:
        """Set from which share of the pool on admitted turns are compact. Raises ConfigError."""


class ChatLike(Protocol):
    """What a replica needs of `loopserve.chat.ChatService`."""

    def stream(self, request: ChatRequest) -> AsyncIterator[tuple[ChatEvent, ...]]:
        """Answer one request; an async generator, closing it cancels the turn."""

    def forget(self, session_id: SessionId) -> None:
        """Drop what is kept of a session."""

    def export(self, session_id: SessionId) -> tuple[Transcript, ...]:
        """The token history of a session."""

    def adopt(self, session_id: SessionId, transcripts: Sequence[Transcript]) -> None:
        """Take over a token history."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The inside of one replica. Built by a factory, so that tests bring their own."""

    engine: EngineLike
    chat: ChatLike


class Replica:
    """One engine behind the wire. Not thread-safe: event loop only."""

    def __init__(
        self,
        backend: Backend,
        settings: DeploySettings,
        *,
        name: str,
        load: LoadMeter,
        metrics: MetricSink | None = None,
        compact_above_ratio: float = 1.0,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        """`compact_above_ratio`: the engine's own setting, which counts where no autopilot says otherwise."""
        self._engine, self._chat = backend.engine, backend.chat
        self._settings = settings
        self._name = name
        self._load = load
        self._metrics = Fan(()) if metrics is None else metrics
        self._conversations = Conversations(limit=settings.conversations_max, clock=unix_time)
        self._num_turns = 0
        self._open: dict[ConversationKey, set[object]] = {}  # turns whose session was not released while they ran
        self._unix_time = unix_time
        self._lease = BudgetLease(clock=time.monotonic)
        self._compact = CompactSetting(
            self._lease, self._engine.set_compact_above, own_ratio=compact_above_ratio, metrics=self._metrics
        )
        doors = Doors(wait_s=settings.handoff.move_timeout_s)
        self._holdings = Holdings(
            self._engine, self._chat, self._conversations, has_turns=lambda key: key in self._open, doors=doors
        )
        self.arrivals = Arrivals(
            self._holdings,
            settings.handoff,
            accepts=lambda: self._accepts,
            deaf_s=settings.stop_timeout_s + _DEAF_SLACK_S,
            metrics=self._metrics,
        )
        self._departures = Departures(
            self._holdings,
            settings.handoff,
            AffinitySettings(spill_turns=settings.spill_turns, move_cost_factor=settings.move_cost_factor),
            name=name,
            drain_s=settings.drain_s,
            load=lambda: load_from_stats(self._load_stats()),
            metrics=self._metrics,
        )
        self._pace = _pace(settings)
        self._loaded_at = int(unix_time())

    async def chat(self, call: TurnCall) -> AsyncGenerator[Item, None]:
        """Answer one call. Never raises an error of the tree: the first item says whether the turn was taken.

        Closing the generator cancels the turn. What a client has already received may come back as history, so it is learned
        however the turn ends.
        """
        received_unix_s = self._unix_time()
        named_key = None if call.session_name is None else session_key(call.tenant, call.session_name)
        await self._holdings.doors.passed(named_key, call.continuation)  # from here to the mark below nothing waits
        name = call.session_name or self._conversations.name_of(call.continuation) or _new_name(call)
        key = session_key(call.tenant, name)
        writer = AnswerWriter(_shape(call))
        is_accepted = False
        turn_mark = object()
        self._open.setdefault(key, set()).add(turn_mark)
        self._num_turns += 1
        try:
            turn = cast(AsyncGenerator[Sequence[ChatEvent], None], self._chat.stream(_chat_request(call, name)))
            async with aclosing(turn):
                async for events in turn:
                    started = None if is_accepted else _started(events)
                    if started is not None:
                        is_accepted = True
                        self._count_outcome(call, is_held=self._conversations.holds(key))
                        if turn_mark in self._open.get(key, ()):
                            claim = session_key(call.claim_tenant, name)
                            self._conversations.use(key, name, claim=claim, home=call.home)
                        yield Accepted(name, self._name, started.cached_tokens, received_unix_s, started.prompt_tokens)
                    item = self._written(events, writer, streams=call.request.stream and is_accepted)
                    if item is not None:
                        yield item
                    if writer.failure() is not None:
                        return
                    if self._pace is not None and item is not None and not writer.is_finished:
                        wait_s = self._pace.wait_s()
                        if wait_s > 0:
                            await asyncio.sleep(wait_s)  # what is said meanwhile comes as one piece
            yield Spent(writer.num_generated_tokens)
        except LoopServeError as error:
            yield self._refusal(error)
        finally:
            self._num_turns -= 1
            if turn_mark in self._open.get(key, ()):
                self._learn(call, key, writer)
                self._open[key].discard(turn_mark)
                if not self._open[key]:
                    del self._open[key]

    def _written(self, events: Sequence[ChatEvent], writer: AnswerWriter, *, streams: bool) -> Item | None:
        """What the client gets for some events. A turn that fails before its stream began is a refusal."""
        if streams:
            had_begun = writer.has_begun
            written = writer.stream(events)
            failure = writer.failure()
            return self._refusal(failure) if failure is not None and not had_begun else written or None
        writer.note(events)
        failure = writer.failure()
        if failure is not None:
            return self._refusal(failure)
        return writer.body() if writer.is_finished else None

    def keep_papers(self) -> None:
        """Have the engine keep on disk whose its sessions are, and know those that lie there. Before it starts."""
        loop = asyncio.get_running_loop()
        self._engine.keep_notes(StoredPapers(self._holdings, was_released=self.arrivals.was_released, loop=loop))

    def status(self) -> ReplicaStatus:
        """What this replica serves, and whether it does."""
        engine = self._engine
        return ReplicaStatus(
            self._name, engine.model_name, engine.max_session_tokens, engine.is_alive(), self._loaded_at
        )

    async def sessions(self, tenant: str) -> tuple[SessionView, ...]:
        """The sessions of one tenant."""
        infos = await asyncio.to_thread(self._engine.sessions)
        named = ((name_in_tenant(tenant, info.session_id), info) for info in infos)
        return tuple(_view(name, info, self._name) for name, info in named if name is not None)

    async def session(self, tenant: str, name: str) -> SessionView | None:
        """One session, or None where it is not here."""
        try:
            info = await asyncio.to_thread(self._engine.session, engine_session_id(tenant, name))
        except NotFound:
            return None
        return _view(name, info, self._name)

    async def release(self, tenant: str, name: str) -> bool:
        """Forget a session, its running turns included, and erase its KV; False where it is not here."""
        session_id, key = engine_session_id(tenant, name), session_key(tenant, name)
        self.arrivals.released(key)
        await self._holdings.doors.passed(key)
        self._open.pop(key, None)  # what its turns still have to say is not learned
        self._conversations.forget(key)
        self._chat.forget(session_id)
        try:
            await asyncio.to_thread(self._engine.release, session_id, cache_salt=tenant)
        except NotFound:
            return False
        return True

    def routing_stats(self) -> dict[str, Any]:
        """What routers know of this replica, about half a second later. Kept small: every router gets all of it."""
        own = pack_claims(self._conversations.claims(self._settings.claims_max), limit=self._settings.claims_max)
        return {"own": own, **self._load_stats()}

    def standing(self) -> Standing:
        """What a replica has to know that looks for new homes for its sessions."""
        return Standing(load_from_stats(self._load_stats()), self.arrivals.all_released())

    async def drain(self, peers: Peers) -> None:
        """Give idle sessions to their next homes, because this replica ends. Takes no turns from now on; never raises."""
        await self._departures.drain(peers)

    async def rebalance_for_ever(self, peers: Peers) -> None:
        """Give sessions back to their homes where this replica is overloaded; returns at once where that is not wanted."""
        await self._departures.rebalance_for_ever(peers)

    @property
    def _accepts(self) -> bool:
        return self._engine.is_alive() and not self._departures.is_draining

    def _load_stats(self) -> dict[str, Any]:
        waiting = min(self._load.num_waiting, self._num_turns)  # the meter stands still while the engine is idle
        return {
            "running": self._num_turns - waiting,
            "waiting": waiting,
            "queue_s": round(self._load.queue_s, 2) if waiting else 0.0,
            "prefill_s_per_token": float(
                f"{self._load.prefill_s_per_token:.2g}"
            ),  # two digits: a new value is a broadcast
            "accepting": self._accepts,
        }

    async def signals(self) -> ReplicaSignals:
        """What the autopilot needs to know, counted now."""
        memory = await asyncio.to_thread(self._engine.memory)
        told = _signals(memory, self._name, accepting=self._engine.is_alive(), unix_time=self._unix_time())
        return replace(told, compact_above_ratio=self._compact.ratio)

    async def set_budget(self, order: BudgetOrder) -> BudgetReply:
        """Obey an autopilot's order, or say whose word counts instead. A ceiling below the engine's floor is refused."""
        reply = self._lease.take(order)
        if reply.obeyed:
            try:
                await asyncio.to_thread(self._engine.set_budget, reply.ceiling_tokens)
                await self._compact.follow()
            except ConfigError as error:
                _log.warning("an order of autopilot %s was refused: %s", order.autopilot, error.message)
                return replace(reply, obeyed=False)
        return reply

    def check_health(self) -> None:
        """Raise EngineUnavailable where the engine cannot answer any more: Serve then replaces this replica."""
        if not self._engine.is_alive():
            raise EngineUnavailable(f"the engine of replica {self._name} is not running")

    def close(self) -> None:
        """End every turn with its terminal event and stop the engine."""
        self._engine.stop()

    def _count_outcome(self, call: TurnCall, *, is_held: bool) -> None:
        continues = bool(known_part(call.request.messages or ()))
        self._metrics.inc(AFFINITY_TURNS, outcome="hit" if is_held else "miss" if continues else "first")

    def _refusal(self, error: LoopServeError) -> Refusal:
        self._metrics.inc(REJECTIONS, reason=error.code)
        return Refusal(error_answer(error), self._name, elsewhere=not self._engine.is_alive())

    def _learn(self, call: TurnCall, key: ConversationKey, writer: AnswerWriter) -> None:
        """Only nameless conversations come back by what was said: a named one would draw in strangers who said and heard the same."""
        messages = call.request.messages
        if messages is None or call.session_name is not None:
            return
        for text in writer.texts:
            if text:
                answered = (*messages, Message("assistant", text))
                own = continuation_key(call.tenant, answered)
                is_own = call.claim_tenant == call.tenant
                self._conversations.learn(
                    key, own, claim=own if is_own else continuation_key(call.claim_tenant, answered)
                )


def _pace(settings: DeploySettings) -> Pace | None:
    """This replica's share of what the ingresses take; None where there are none in between."""
    if settings.topology == "direct":
        return None
    per_s = settings.pieces_per_s * settings.ingress_replicas / settings.replicas
    return Pace(per_s, burst_s=_PIECES_BURST_S, clock=time.monotonic)


def _new_name(call: TurnCall) -> str:
    return generated_session_name(ConversationKey(call.home), secrets.token_hex(8))


def _started(events: Sequence[ChatEvent]) -> AnswerStarted | None:
    return next((event for event in events if isinstance(event, AnswerStarted)), None)


def _chat_request(call: TurnCall, session_name: str) -> ChatRequest:
    request = call.request
    return ChatRequest(
        session_id=engine_session_id(call.tenant, session_name),
        messages=request.messages,
        prompt=request.prompt,
        sampling=request.sampling,
        contract=request.contract,
        stop=request.stop,
        num_branches=request.num_branches,
        cache_salt=call.tenant,
        trace_parent=call.trace_parent,
    )


def _shape(call: TurnCall) -> AnswerShape:
    request = call.request
    return AnswerShape(
        endpoint=request.endpoint,
        response_id=call.response_id,
        created=call.created,
        model=request.model,
        num_branches=request.num_branches,
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
    )


def _view(name: str, info: SessionInfo, replica: str) -> SessionView:
    return SessionView(
        id=name,
        replica=replica,
        num_tokens=info.num_tokens,
        num_cached_tokens=info.num_cached_tokens,
        num_branches=info.num_branches,
        num_turns=info.num_turns,
        is_active=info.is_active,
        idle_s=round(info.idle_s, 3),
    )


def _signals(memory: MemoryStats, replica: str, *, accepting: bool, unix_time: float) -> ReplicaSignals:
    blocks, host_blocks, block_bytes = memory.blocks, memory.host_blocks, memory.block_bytes
    return ReplicaSignals(
        replica=replica,
        unix_time=unix_time,
        accepting=accepting,
        capacity_bytes=memory.capacity_bytes,
        active_bytes=blocks.active * block_bytes,
        warm_bytes=blocks.warm * block_bytes,
        shared_bytes=blocks.shared * block_bytes,
        demand=tuple((point.budget_tokens, point.active_bytes, point.warm_bytes) for point in memory.demand),
        num_running=memory.num_running_turns,
        num_waiting=memory.num_waiting_turns,
        max_running=memory.max_running_turns,
        budget_ceiling_tokens=memory.budget_ceiling_tokens,
        budget_max_tokens=memory.budget_max_tokens,
        budget_floor_tokens=memory.budget_floor_tokens,
        host_capacity_bytes=host_blocks.total * block_bytes,
        host_live_bytes=(host_blocks.active + host_blocks.shared) * block_bytes,
        host_warm_bytes=host_blocks.warm * block_bytes,
    )
