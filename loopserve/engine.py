"""Hops 5 and 10: the engine. Takes turns from any thread, runs steps on one, and delivers every turn's events.

    submit (any thread) --> scheduler's queue --[ step: plan, launch, apply ]--> on_events (engine thread)

On CUDA the next decode step is launched before this one's tokens are known, where it can be told (`Scheduler.plan_ahead`): it reads them
on the device. Steps are applied in order all the same.

One lock guards the scheduler, the cache and the sessions. It is held while a step is planned and applied, never while the model
runs, so `submit`, `cancel` and the questions return in well under a step. Whatever happens, every accepted turn gets exactly one
`TurnEnded`, and after a failure no further turn is accepted.
"""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from loopserve.admission import Limits, check_request
from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.crossover import Place, find_crossover
from loopserve.dialogue import FinishReason, SessionId, TurnEnded, TurnEvent, TurnId, TurnRequest
from loopserve.errors import ConfigError, EngineUnavailable, InvalidRequest, LoopServeError, NotFound, Overloaded
from loopserve.handoff import ImportedSession, Porter, kv_format
from loopserve.keeper import Keeper
from loopserve.kv.cache import KVCache, Tier
from loopserve.kv.image import decode, encode
from loopserve.loading import LoadedModel, device_name, load_model
from loopserve.memory import memory_stats
from loopserve.methods import DECODE_RULES, PREFILL_RULES
from loopserve.notes import SessionNotes
from loopserve.plan import BlockCopy, BlockId, StepPlan
from loopserve.quality import TurnPolicy
from loopserve.room import Room
from loopserve.runner import Launched, ModelRunner, Runner, bytes_a_block, num_host_pool_blocks, num_pool_blocks
from loopserve.scheduler import Scheduler
from loopserve.sessions import SessionInfo, SessionTable
from loopserve.stats import MemoryStats, NullSink, Occupancy, StatsSink
from loopserve.turn import Turn

T = TypeVar("T")
OnEvents = Callable[[Sequence[TurnEvent]], None]

_log = logging.getLogger(__name__)
_STOP_WAIT_S = 30.0  # for the step in flight when the engine is stopped
_OFFLOAD_EVERY_S = 1.0  # long-idle sessions are looked for
_IDLE_WAIT_S = 1.0  # an idle engine looks for expired turns this often
_BRANCH_SEED_STRIDE = 0x9E3779B9  # keeps the branches of one seed apart from those of its neighbours


@dataclass(frozen=True, slots=True)
class _Erasure:
    """Blocks to be zeroed, once what is still on its way has been copied, and who waits for it."""

    copies: tuple[BlockCopy, ...]
    blocks: tuple[BlockId, ...]
    waiting: tuple[Future[None], ...]


@dataclass(frozen=True, slots=True)
class _Errand(Generic[T]):
    """Something that the engine thread does between two steps, and who waits for what comes of it."""

    act: Callable[[], T]
    answer: Future[T] = field(default_factory=Future)

    def run(self) -> None:
        """Do it. What is no refusal breaks the engine, too."""
        try:
            self.answer.set_result(self.act())
        except LoopServeError as error:
            self.answer.set_exception(error)
        except Exception as error:
            self.refuse(f"The engine failed: {error}.")
            raise

    def refuse(self, error: str) -> None:
        """Nobody will do it."""
        if not self.answer.done():
            self.answer.set_exception(EngineUnavailable(error))


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and not applied yet."""

    plan: StepPlan
    launched: Launched
    began_s: float


class Engine:
    """The dual-phase engine. Use it with a thread (`start`, `stop`) or drive it yourself (`step`)."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        loaded: LoadedModel | None = None,
        runner: Runner | None = None,
        stats: StatsSink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the model, unless it is given, and allocate the KV pool. Raises ConfigError and UnsupportedModel."""
        _check_methods(config)
        loaded = load_model(config) if loaded is None else loaded
        config = _with_thresholds(config, loaded)
        num_blocks = num_pool_blocks(loaded, config)
        num_host_blocks = num_host_pool_blocks(loaded, config, num_blocks)
        self._block_bytes = bytes_a_block(loaded, config)
        self._config = config
        self._loaded = loaded
        self.model_shape = loaded.shape
        self._stats = NullSink() if stats is None else stats
        self._clock = clock
        if runner is None:
            runner = ModelRunner(loaded, config, num_blocks=num_blocks, num_host_blocks=num_host_blocks)
        self._runner = runner
        self._cache = KVCache(
            num_blocks,
            num_host_blocks=num_host_blocks,
            fingerprint=loaded.fingerprint,
            makes_runs=loaded.device.type == "cpu" or num_host_blocks > 0,  # what moves between tiers moves by runs
        )
        self._sessions = SessionTable(
            self._cache,
            max_sessions=config.max_sessions,
            max_branches=config.max_branches,
            reuse=config.reuse,
            clock=clock,
            block_bytes=self._block_bytes,
        )
        self._room = Room(config, self._cache, self._sessions)
        self._scheduler = Scheduler(
            config,
            self._cache,
            self._sessions,
            self._room,
            shape=self.model_shape,
            clock=clock,
        )
        most = config.max_session_tokens or loaded.max_positions
        self.max_session_tokens = min(most, loaded.max_positions, self._cache.pool.num_usable * BLOCK_TOKENS)
        self._limits = Limits(self.max_session_tokens, loaded.vocab_size, config.max_branches)
        self._turn_ids = itertools.count(1)
        self._seeds = random.Random(config.seed)
        self._work = threading.Condition()
        self._audience: dict[TurnId, tuple[Turn, OnEvents]] = {}  # of every accepted turn whose end is not delivered
        self._cancels: dict[TurnId, FinishReason] = {}
        self._releases: list[tuple[SessionId, Future[None]]] = []
        self._errands: list[_Errand[Any]] = []
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._failure: str | None = None
        self._step_began_s: float | None = None
        self._launches_ahead = loaded.device.type == "cuda" if config.launch_ahead is None else config.launch_ahead
        self._in_flight: _Flight | None = None
        self._offload_next_s = 0.0
        self._porter = Porter(
            self._work,
            self._scheduler,
            self._sessions,
            self._cache,
            runner,
            fmt=kv_format(loaded),
            block_bytes=self._block_bytes,
        )
        self._keeper: Keeper | None = None
        if config.disk.directory:
            self._keeper = Keeper(
                config.disk,
                self._porter,
                self._scheduler,
                self._sessions,
                self._work,
                between_steps=self._between_steps,
                clock=clock,
            )

    @property
    def _is_threaded(self) -> bool:
        """Whether steps are run by a thread of the engine's own."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self._loaded.name

    def keep_notes(self, notes: SessionNotes) -> None:
        """Have notes kept beside the sessions on disk, and be told of those that lie there. Before `start`; in vain without a disk."""
        assert self._thread is None, "the engine runs already"
        if self._keeper is not None:
            self._keeper.keep_notes(notes)

    def start(self) -> None:
        """Run steps on a thread of the engine's own until `stop`."""
        assert self._thread is None, "the engine runs already"
        self._thread = threading.Thread(target=self._run, name="loopserve-engine", daemon=True)
        self._thread.start()
        if self._keeper is not None:
            self._keeper.start()

    def stop(self) -> None:
        """Finish the step in flight, end every turn, and stop taking new ones. Idempotent."""
        with self._work:
            self._is_stopping = True
            self._work.notify_all()
        if self._thread is not None:
            self._thread.join(_STOP_WAIT_S)
        self._end_everything("The engine is shutting down; send the turn again.")
        if self._keeper is not None:
            self._keeper.stop(is_sound=self._failure is None and not self._is_threaded)

    def is_alive(self) -> bool:
        """Whether turns make progress: the thread runs, has not failed, and is not stuck in one step."""
        began_s = self._step_began_s
        is_stuck = began_s is not None and self._clock() - began_s > self._config.max_step_s
        return self._thread is not None and self._thread.is_alive() and self._failure is None and not is_stuck

    def submit(self, request: TurnRequest, on_events: OnEvents) -> tuple[TurnId, ...]:
        """Accept a turn; one id for each of its branches. Thread-safe.

        `on_events` is called on the engine thread with the events of one step and must not block. Raises InvalidRequest,
        ContextLengthExceeded, Overloaded or EngineUnavailable, and then nothing was accepted.
        """
        check_request(request, self._limits)
        with self._work:
            self._check_available()
            self._check_salt(request)
            room = self._config.max_waiting_turns - self._scheduler.num_waiting
            if request.num_branches > room:
                raise Overloaded(
                    f"{self._scheduler.num_waiting} turns are waiting and the queue takes {self._config.max_waiting_turns}; "
                    "try again shortly."
                )
            turns = self._make_turns(request)
            for turn in turns:
                self._scheduler.add(turn)
                self._audience[turn.turn_id] = (turn, on_events)
            if self._keeper is not None and self._config.reuse:
                self._keeper.fetch_for(turns)
            self._work.notify_all()
        return tuple(turn.turn_id for turn in turns)

    def cancel(self, turn_id: TurnId, *, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a turn before the next step; its KV becomes warm. Thread-safe; an unknown or ended turn is ignored."""
        with self._work:
            if turn_id in self._audience:
                self._cancels.setdefault(turn_id, reason)
                self._work.notify_all()

    def set_budget(self, tokens: int | None) -> None:
        """Set the ceiling of the token selections, None lifts it; each turn follows at its next refresh. Thread-safe.

        A compact turn gives memory back, or takes more, when it follows. What a request asked for itself is kept: its `budget_tokens`,
        `min_coverage` and `exact`. Raises ConfigError below the floor.
        """
        floor = self._config.decode.budget_floor_tokens
        if tokens is not None and tokens < floor:
            raise ConfigError(f"The budget would be {tokens} tokens; the floor is {floor}.")
        with self._work:
            self._room.budget_ceiling_tokens = tokens

    def set_compact_above(self, ratio: float) -> None:
        """From which share of the device pool on, 0 to 1, turns that are admitted are compact; 1: only when it is full. Thread-safe.

        Raises ConfigError outside that range.
        """
        if not 0.0 <= ratio <= 1.0:
            raise ConfigError(f"Turns would be compact above {ratio} of the pool; a share from 0 to 1 is needed.")
        with self._work:
            self._room.compact_above_ratio = ratio

    def sessions(self) -> tuple[SessionInfo, ...]:
        """Every session, least recently used first. Thread-safe."""
        with self._work:
            return tuple(self._sessions.info(session) for session in self._sessions)

    def session(self, session_id: SessionId) -> SessionInfo:
        """One session. Thread-safe. Raises NotFound."""
        with self._work:
            return self._sessions.info(self._sessions.get(session_id))

    def release(self, session_id: SessionId, *, cache_salt: str | None = None) -> None:
        """Cancel the session's turns, forget it, erase its KV and remove it from disk. Thread-safe; waits for the step in flight.

        With its `cache_salt` a session is removed from disk that was never here.

        Blocks that another session holds, of the same tenant then, stay. All others are zero when this returns, as is whatever else lay
        unerased in free blocks.

        Raises NotFound, or EngineUnavailable when no step will carry it out. Not to be called by a listener.
        """
        done: Future[None] = Future()
        with self._work:
            self._check_available()
            salts = self._salts_of(session_id)
            is_here = bool(salts)
            if self._keeper is not None:
                salts |= {salt for salt in (cache_salt, self._keeper.salt_of(session_id)) if salt is not None}
            if not salts:
                self._sessions.get(session_id)  # says that it is not there
            self._releases.append((session_id, done))
            self._work.notify_all()
            erasure = self._carry_out_requests() if self._thread is None else None
        self._erase(erasure)
        self._deliver()
        try:
            done.result(timeout=self._config.max_step_s)
            if self._keeper is not None:
                limit_s = self._config.max_step_s
                was_on_disk = [self._keeper.drop(session_id, salt, timeout_s=limit_s) for salt in salts]
                if not is_here and not any(was_on_disk):
                    raise NotFound(f"There is no session {session_id!r}.")
        except TimeoutError:
            raise EngineUnavailable(f"No step ended within {self._config.max_step_s:.0f} s.") from None

    def export_session(self, session_id: SessionId) -> bytes:
        """The image of an idle session, to be imported by another engine of the same model. Thread-safe; waits for the step in flight.

        The session stays here. Raises NotFound, Overloaded while a turn of it runs or waits, EngineUnavailable when no step will carry
        it out. Not to be called by a listener.
        """
        return encode(self._between_steps(lambda: self._porter.image_of(session_id)), self._porter.fmt)

    def import_session(self, data: bytes) -> ImportedSession:
        """Take a session over from its image; what is known of it here is replaced. Thread-safe; waits for the step in flight.

        Sessions that have been idle longest give way to it, first in host memory. Raises ImageRefused for what is no whole image of a
        session of this model, Overloaded while a turn of the session is here or where there is no room, InvalidRequest for a session that
        belongs to another cache salt, EngineUnavailable. Not to be called by a listener.
        """
        image = decode(data, self._porter.fmt)
        return self._between_steps(lambda: self._porter.take_over(image))

    def occupancy(self, tier: Tier = Tier.DEVICE) -> Occupancy:
        """Blocks of a tier by kind, counted now. Thread-safe."""
        with self._work:
            return self._sessions.occupancy(tier)

    def memory(self) -> MemoryStats:
        """The pool, and what the present conversations want of it, counted now. Thread-safe; linear in blocks and sessions."""
        with self._work:
            return memory_stats(
                self._config,
                self._scheduler,
                self._room,
                self._sessions,
                block_bytes=self._block_bytes,
                device_bytes=self._runner.device_bytes,
                disk=None if self._keeper is None else self._keeper.counts(),
            )

    def check(self) -> None:
        """Assert that no block is lost, shared wrongly or counted twice."""
        with self._work:
            self._cache.check()
            for tier in Tier:
                occupancy = self._sessions.occupancy(tier)
                parts = (occupancy.active, occupancy.warm, occupancy.shared, occupancy.cached, occupancy.free)
                assert sum(parts) == occupancy.total, f"blocks are lost: {tier}, {occupancy}"

    def step(self) -> bool:
        """Finish one step: plan and launch it unless it was launched ahead, launch the next if it can be told, wait, apply.

        False when there was nothing to compute.
        """
        self._run_errands()
        self._offload_idle()
        with self._work:
            erasure = self._carry_out_requests()
            plan = self._scheduler.plan() if self._in_flight is None else None
        self._erase(erasure)  # before the step: the plan may write into the same blocks
        self._deliver()
        flight = self._launch(plan) if plan is not None else self._in_flight
        if flight is None:
            return False
        failure = None
        try:
            self._in_flight = self._launch_after(flight)
        except Exception as error:  # of the next step: this one's tokens are told first
            self._in_flight, failure = None, error
        self._step_began_s = flight.began_s
        result = flight.launched.result()
        with self._work:
            self._scheduler.apply(flight.plan, result)
            ended_s = self._clock()
            stats = self._scheduler.step_stats(flight.plan, duration_s=ended_s - flight.began_s)
        self._step_began_s = None
        if self._in_flight is not None:  # it waited for this one
            self._in_flight = replace(self._in_flight, began_s=ended_s)
        self._deliver()
        self._stats.on_step(stats)
        if self._keeper is not None:
            self._keeper.note_step(stats)
        if failure is not None:
            raise failure
        return True

    def _launch(self, plan: StepPlan) -> _Flight:
        self._step_began_s = began_s = self._clock()
        return _Flight(plan, self._runner.launch(plan), began_s)

    def _launch_after(self, flight: _Flight) -> _Flight | None:
        """Launch the step after one that is running, so that the device does not wait for the host in between."""
        if not self._launches_ahead:
            return None
        with self._work:
            plan = self._scheduler.plan_ahead(flight.plan)
        return None if plan is None else self._launch(plan)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                if not self.step():
                    with self._work:
                        self._work.wait_for(self._has_work, timeout=_IDLE_WAIT_S)
        except Exception as error:  # whatever broke, the turns must be told; Serve replaces the replica
            _log.exception("the engine thread died")
            self._failure = f"The engine failed: {error}. Send the turn again; another replica will answer it."
            self._end_everything(self._failure)

    def _has_work(self) -> bool:
        asked = bool(self._cancels) or bool(self._releases) or bool(self._errands)
        asked |= self._keeper is not None and self._keeper.has_arrivals
        return self._is_stopping or asked or self._scheduler.has_work

    def _between_steps(self, act: Callable[[], T]) -> T:
        """Have the engine thread do something between two steps, and wait for its answer."""
        errand = _Errand(act)
        with self._work:
            if self._is_threaded:
                self._check_available()
            self._errands.append(errand)
            self._work.notify_all()
        if not self._is_threaded:  # it is driven step by step, or over
            self._run_errands()
        try:
            return errand.answer.result(timeout=self._config.max_step_s)
        except TimeoutError:
            raise EngineUnavailable(f"No step ended within {self._config.max_step_s:.0f} s.") from None

    def _offload_idle(self) -> None:
        """Now and then, sessions that have been idle for long leave the device. Between steps only; the lock is not held."""
        now_s = self._clock()
        if now_s < self._offload_next_s or self._in_flight is not None:
            return
        self._offload_next_s = now_s + _OFFLOAD_EVERY_S
        with self._work:
            self._sessions.offload_idle_since(now_s - self._config.offload_after_s)
            copies = self._cache.take_copies()
        self._runner.copy(copies)

    def _run_errands(self) -> None:
        """Between steps only; the lock is not held."""
        if self._keeper is not None:
            self._keeper.take_arrivals()
        with self._work:
            errands, self._errands = self._errands, []
        for errand in errands:
            errand.run()

    def _make_turns(self, request: TurnRequest) -> list[Turn]:
        policy = TurnPolicy.resolve(request.contract, self._config)
        seed = request.sampling.seed
        base = self._seeds.getrandbits(62) if seed is None else seed
        turns: list[Turn] = []
        for index in range(request.num_branches):
            turns.append(
                Turn(
                    turn_id=TurnId(next(self._turn_ids)),
                    request=request,
                    policy=policy,
                    seed=base + index * _BRANCH_SEED_STRIDE,
                    eos_ids=self._loaded.eos_ids,
                    max_session_tokens=self.max_session_tokens,
                    arrived_s=self._clock(),
                    leader=turns[0] if turns else None,
                )
            )
        return turns

    def _check_available(self) -> None:
        if self._failure is not None or self._is_stopping:
            raise EngineUnavailable(self._failure or "The engine is shutting down.")

    def _check_salt(self, request: TurnRequest) -> None:
        """Refuse a second salt for a session here: on the engine thread it would be too late to tell the client."""
        session_id = request.session_id
        salts = self._salts_of(session_id)
        if salts - {request.cache_salt}:
            raise InvalidRequest(
                f"Session {session_id!r} belongs to another cache salt; use another session id.", param="session_id"
            )

    def _salts_of(self, session_id: SessionId) -> set[str]:
        """The one salt of a session that is here or asked for, or none."""
        salts = {turn.request.cache_salt for turn in self._scheduler.turns() if turn.request.session_id == session_id}
        known = self._sessions.find(session_id)
        return salts if known is None else salts | {known.salt}

    def _carry_out_requests(self) -> _Erasure | None:
        """End what was cancelled, forget what was released; what is to be erased for that. Between steps only; the lock is held."""
        by_id = {turn.turn_id: turn for turn in self._scheduler.turns()} if self._cancels or self._releases else {}
        released = {session_id for session_id, _ in self._releases}
        for turn in by_id.values():
            if turn.turn_id in self._cancels:
                self._scheduler.end(turn, self._cancels[turn.turn_id])
            elif turn.request.session_id in released:
                self._scheduler.end(turn, FinishReason.CANCELLED)
        self._cancels.clear()
        for session_id in released:
            if self._sessions.find(session_id) is not None:
                self._sessions.release(session_id)
        if not released:
            return None
        copies = self._cache.take_copies()
        erasure = _Erasure(copies, self._cache.take_stale(), tuple(done for _, done in self._releases))
        self._releases.clear()
        self._scheduler.room_was_made()
        return erasure

    def _erase(self, erasure: _Erasure | None) -> None:
        """Erase on the device and tell who waits for it. Between steps only; the lock is not held."""
        if erasure is None:
            return
        try:
            self._runner.copy(erasure.copies)
            if erasure.blocks:
                self._runner.erase(erasure.blocks)
        except Exception as error:
            for done in erasure.waiting:
                done.set_exception(EngineUnavailable(f"The engine failed while it erased a session: {error}."))
            raise
        for done in erasure.waiting:
            done.set_result(None)

    def _deliver(self) -> None:
        """Hand events to their listeners, one call a listener, and finished turns to the stats. The lock is not held."""
        with self._work:
            notices, turn_stats = self._scheduler.take_notices(), self._scheduler.take_turn_stats()
            batches: dict[int, tuple[OnEvents, list[TurnEvent]]] = {}  # by identity: a listener need not be hashable
            for notice in notices:
                if notice.turn.turn_id not in self._audience:
                    continue
                _, listener = self._audience[notice.turn.turn_id]
                batches.setdefault(id(listener), (listener, []))[1].append(notice.event)
                if isinstance(notice.event, TurnEnded):
                    del self._audience[notice.turn.turn_id]
        for listener, events in batches.values():
            self._call(listener, events)
        for stats in turn_stats:
            self._stats.on_turn(stats)

    def _call(self, listener: OnEvents, events: Sequence[TurnEvent]) -> None:
        try:
            listener(events)
        except Exception:  # a broken client must not take the batch with it
            _log.exception("a listener failed; its turns are cancelled")
            for event in events:
                self.cancel(event.turn_id)

    def _end_everything(self, error: str) -> None:
        """Give every turn its terminal event without trusting the scheduler's state."""
        with self._work:
            events: dict[TurnId, list[TurnEvent]] = {}  # what the broken step left undelivered, ends included
            for notice in self._scheduler.take_notices():
                events.setdefault(notice.turn.turn_id, []).append(notice.event)
            audience, self._audience = self._audience, {}
            releases, self._releases = self._releases, []
            errands, self._errands = self._errands, []
        for turn_id, (turn, listener) in audience.items():
            last_events = events.get(turn_id, [])
            if not last_events or not isinstance(last_events[-1], TurnEnded):
                usage, output_ids = turn.usage(), tuple(turn.output_ids())
                last_events.append(TurnEnded(turn_id, FinishReason.ERROR, usage, output_ids, error))
            self._call(listener, last_events)
        for _, done in releases:
            if not done.done():
                done.set_exception(EngineUnavailable(error))
        for errand in errands:
            errand.refuse(error)


def _call(act: Callable[[], T]) -> T:
    return act()


def _check_methods(config: EngineConfig) -> None:
    for kind, name, known in (
        ("prefill", config.prefill.method, PREFILL_RULES),
        ("decode", config.decode.method, DECODE_RULES),
    ):
        if name not in known:
            raise ConfigError(f"{kind}.method is {name!r}; known are {', '.join(sorted(known))}.")


def _with_thresholds(config: EngineConfig, loaded: LoadedModel) -> EngineConfig:
    """The settings with what a table says of this device where they say nothing: from which length on `auto` is sparse."""
    found = find_crossover(config, Place(device_name(loaded.device), loaded.device.type, loaded.shape))
    _log.info("%s", found.sentence(config))
    return found.applied_to(config)
