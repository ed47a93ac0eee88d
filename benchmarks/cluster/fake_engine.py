"""An engine that computes nothing: every 5 ms, or as often as asked, one token for every open stream. What is measured is a token's way.

Two ways: `step_backend` goes into a replica, as the real engine does, with everything that LoopServe does around it; `bare_api` is what
one would write without LoopServe. A token's text is the moment it was emitted, in microseconds of this machine's monotonic clock.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from deploy.replica import Backend
from loopserve.chat import AnswerDelta, AnswerEnded, AnswerStarted, ChatEvent, ChatRequest, _Inbox
from loopserve.config import EngineConfig
from loopserve.dialogue import FinishReason, Mode, QualityReport, SessionId, TurnUsage
from loopserve.errors import NotFound
from loopserve.sessions import SessionInfo
from loopserve.stats import BudgetDemand, MemoryStats, Occupancy, StatsSink

MODEL = "step-engine"
STEP_VARIABLE = "STEP_ENGINE_MS"  # in the environment of whatever process steps
STEP_S = float(os.environ.get(STEP_VARIABLE, "5")) / 1000
TOKENS_PER_S = 1 / STEP_S  # of one stream
_ALIVE_CHECK_S = 1.0


class StepEngine:
    """One thread that steps for all streams at once, as an engine with a batch does. It does not make up for steps that came late."""

    model_name = MODEL
    max_session_tokens = 1_000_000

    def __init__(self) -> None:
        self._streams: set[_Inbox] = set()
        self._lock = threading.Lock()
        self._is_running = False

    def start(self) -> None:
        """Begin to step."""
        self._is_running = True
        threading.Thread(target=self._run, name="step-engine", daemon=True).start()

    def stop(self) -> None:
        """Step no more."""
        self._is_running = False

    def is_alive(self) -> bool:
        """Whether it steps."""
        return self._is_running

    def add(self, stream: _Inbox) -> None:
        """From the next step on a token for this stream."""
        with self._lock:
            self._streams = {*self._streams, stream}

    def remove(self, stream: _Inbox) -> None:
        """No more tokens for it."""
        with self._lock:
            self._streams = self._streams - {stream}

    def sessions(self) -> tuple[SessionInfo, ...]:
        """It keeps none."""
        return ()

    def session(self, session_id: SessionId) -> SessionInfo:
        """It keeps none. Raises NotFound."""
        raise NotFound(f"There is no session {session_id!r}.")

    def release(self, session_id: SessionId, *, cache_salt: str | None = None) -> None:
        """It keeps none. Raises NotFound."""
        self.session(session_id)

    def memory(self) -> MemoryStats:
        """A pool that nobody uses."""
        return MemoryStats(
            num_running_turns=len(self._streams),
            num_waiting_turns=0,
            max_running_turns=1024,
            num_compact_turns=0,
            block_bytes=1,
            device_bytes=1,
            blocks=Occupancy(total=1, active=0, warm=0, shared=0, cached=0, free=1),
            host_blocks=Occupancy(total=0, active=0, warm=0, shared=0, cached=0, free=0),
            num_active_sessions=len(self._streams),
            num_warm_sessions=0,
            active_tokens=0,
            warm_tokens=0,
            computed_tokens=0,
            demand=(BudgetDemand(None, 0, 0),),
            budget_tokens=1,
            compact_budget_tokens=1,
            budget_ceiling_tokens=None,
            budget_max_tokens=1,
            budget_floor_tokens=1,
        )

    def set_budget(self, tokens: int | None) -> None:
        """Nothing is selected here."""

    def set_compact_above(self, ratio: float) -> None:
        """Nothing is held here."""

    def keep_notes(self, notes: object) -> None:
        """Nothing is kept here."""

    def _run(self) -> None:
        due_s = time.monotonic()
        while self._is_running:
            due_s = max(due_s + STEP_S, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))
            token = (AnswerDelta(0, f" {time.monotonic_ns() // 1000}", 1, ()),)
            for stream in self._streams:
                stream.put(token)  # type: ignore[arg-type]  # the hand-over of the real service; what it carries is all one to it


class StepChat:
    """Answers every request with tokens until the client leaves, or has its `max_tokens`."""

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine

    def forget(self, session_id: SessionId) -> None:
        """It keeps nothing."""

    async def stream(self, request: ChatRequest) -> AsyncIterator[tuple[ChatEvent, ...]]:
        """All tokens that wait, as `loopserve.chat.ChatService` gives them."""
        left = request.sampling.max_tokens or 1_000_000
        yield (AnswerStarted(0, 1, 0, 0),)
        async for tokens in _tokens(self._engine):
            left -= len(tokens)
            yield tuple(tokens)
            if left <= 0:
                break
        usage = TurnUsage(1, 0, 0, QualityReport(Mode.EXACT))
        yield (AnswerEnded(0, FinishReason.LENGTH, usage),)


def step_backend(config: EngineConfig, stats: StatsSink, *, num_threads: int) -> Backend:
    """Factory, by dotted path `benchmarks.cluster.fake_engine:step_backend`."""
    engine = StepEngine()
    return Backend(engine, StepChat(engine))


def bare_api() -> FastAPI:
    """The least that streams the same bytes: FastAPI and a string. Factory for uvicorn."""
    engine = StepEngine()
    engine.start()
    api = FastAPI()
    head = (
        'data: {"id": "chatcmpl-00000000000000000000000000000000", "object": "chat.completion.chunk", "created": 1700000000, '
        f'"model": "{MODEL}", "system_fingerprint": null,"choices":[{{"index":0,"delta":{{"content":"'
    )
    tail = '"},"logprobs":null,"finish_reason":null}]}\n\n'

    async def events() -> AsyncIterator[str]:
        async for tokens in _tokens(engine):
            yield "".join([f"{head}{token.text}{tail}" for token in tokens])

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        await request.json()
        return StreamingResponse(events(), media_type="text/event-stream")

    @api.get("/ready")
    async def ready() -> dict[str, list[str]]:
        return {"replicas": ["bare"]}

    return api


async def _tokens(engine: StepEngine) -> AsyncIterator[Sequence[AnswerDelta]]:
    inbox = _Inbox(asyncio.get_running_loop())
    engine.add(inbox)
    try:
        while True:
            tokens = await inbox.take(_ALIVE_CHECK_S)
            if tokens:
                yield tokens  # type: ignore[misc]
    finally:
        engine.remove(inbox)
        inbox.close()
