"""A backend without a model, for tests of the deployment. What it does is written in the request's last message:

    tokens=N    answer with N words (3)            step_ms=M   one word every M milliseconds (0)
    refuse=E    raise an error of the tree         wait_ms=M   admitted only after M milliseconds
    die=engine  the engine dies, the turn with it  say=pid     the answer is the process id
    fail=N      the turn ends with an error after N words        kill=N  as fail, and the engine dies

    block_ms=M  the whole replica stands still for M milliseconds

Tokens are words. It keeps sessions, so that `cached_tokens` shows whether a conversation came back to the replica that holds it.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace

import loopserve.errors
from deploy.replica import Backend
from loopserve.chat import AnswerDelta, AnswerEnded, AnswerStarted, ChatEvent, ChatRequest, TokenText
from loopserve.config import EngineConfig
from loopserve.dialogue import FinishReason, Mode, QualityReport, SessionId, TurnUsage
from loopserve.errors import ConfigError, EngineUnavailable, NotFound, Overloaded
from loopserve.sessions import SessionInfo
from loopserve.stats import BudgetDemand, MemoryStats, Occupancy, StatsSink
from loopserve.transcripts import Transcript

MODEL = "fake-model"


class FakeEngine:
    model_name = MODEL
    max_session_tokens = 1000

    def __init__(self) -> None:
        self.is_running = False
        self.kept: dict[SessionId, SessionInfo] = {}
        self.ceiling_tokens: int | None = None
        self.compact_above_ratio = 1.0

    def start(self) -> None:
        self.is_running = True

    def stop(self) -> None:
        self.is_running = False

    def is_alive(self) -> bool:
        return self.is_running

    def sessions(self) -> tuple[SessionInfo, ...]:
        return tuple(self.kept.values())

    def session(self, session_id: SessionId) -> SessionInfo:
        if session_id not in self.kept:
            raise NotFound(f"no session {session_id}")
        return self.kept[session_id]

    def release(self, session_id: SessionId, *, cache_salt: str | None = None) -> None:
        self.session(session_id)
        del self.kept[session_id]

    def export_session(self, session_id: SessionId) -> bytes:
        """What it knows of the session as JSON, and a KV byte a token."""
        info = self.session(session_id)
        if info.is_active:
            raise Overloaded("a turn of it runs")
        return json.dumps(asdict(info)).encode() + b"\n" + b"k" * info.num_cached_tokens

    def import_session(self, data: bytes) -> SessionInfo:
        if not self.is_running:
            raise EngineUnavailable("the engine is dead")
        try:
            info = SessionInfo(**json.loads(data.partition(b"\n")[0]))
        except ValueError as error:
            raise ImageRefused("corrupt") from error
        known = self.kept.get(info.session_id)
        if known is not None and known.is_active:
            raise Overloaded("a turn of it runs")
        self.kept[info.session_id] = info
        return info

    def memory(self) -> MemoryStats:
        """Ten blocks of 1,600 bytes: one of an active conversation, two warm ones, one shared; as many on the host, four of them warm."""
        return MemoryStats(
            num_running_turns=1,
            num_waiting_turns=0,
            max_running_turns=4,
            num_compact_turns=0,
            block_bytes=1600,
            device_bytes=20_000,
            blocks=Occupancy(total=10, active=1, warm=2, shared=1, cached=2, free=4),
            host_blocks=Occupancy(total=10, active=0, warm=4, shared=1, cached=0, free=5),
            num_active_sessions=1,
            num_warm_sessions=1,
            active_tokens=30,
            warm_tokens=40,
            computed_tokens=30,
            demand=(BudgetDemand(8, 1000, 1200), BudgetDemand(16, 1800, 2000), BudgetDemand(None, 3000, 4000)),
            budget_tokens=min(16, self.ceiling_tokens or 16),
            compact_budget_tokens=min(16, self.ceiling_tokens or 16),
            budget_ceiling_tokens=self.ceiling_tokens,
            budget_max_tokens=16,
            budget_floor_tokens=8,
        )

    def set_budget(self, tokens: int | None) -> None:
        if tokens is not None and tokens < 8:
            raise ConfigError("below the floor of 8")
        self.ceiling_tokens = tokens

    def set_compact_above(self, ratio: float) -> None:
        self.compact_above_ratio = ratio

    def keep_notes(self, notes: object) -> None:
        """It has no disk."""


class ImageRefused(Exception):
    """As the engine's: outside of the tree, with a reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FakeChat:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.transcripts: dict[SessionId, tuple[Transcript, ...]] = {}
        self.cancelled: list[SessionId] = []
        self.requests: list[ChatRequest] = []

    def forget(self, session_id: SessionId) -> None:
        self.transcripts.pop(session_id, None)

    def export(self, session_id: SessionId) -> tuple[Transcript, ...]:
        return self.transcripts.get(session_id, ())

    def adopt(self, session_id: SessionId, transcripts: Sequence[Transcript]) -> None:
        self.transcripts[session_id] = (*self.export(session_id), *transcripts)

    async def stream(self, request: ChatRequest) -> AsyncIterator[tuple[ChatEvent, ...]]:
        self.requests.append(request)
        orders = _orders(request)
        if "refuse" in orders:
            kind = getattr(loopserve.errors, orders["refuse"])
            raise kind("refused as asked", retry_after_s=7.2) if kind is Overloaded else kind("refused as asked")
        if not self.engine.is_alive():
            raise EngineUnavailable("the engine is dead")
        if orders.get("die") == "engine":
            self.engine.is_running = False
            raise EngineUnavailable("the engine died")
        time.sleep(int(orders.get("block_ms", 0)) / 1000)
        await asyncio.sleep(int(orders.get("wait_ms", 0)) / 1000)
        prompt, cached = self._begin(request)
        words = [str(os.getpid())] if orders.get("say") == "pid" else ["word"] * int(orders.get("tokens", 3))
        try:
            branches = range(request.num_branches)
            yield tuple(AnswerStarted(i, prompt, cached, 0) for i in branches)
            for number, word in enumerate(words):
                await asyncio.sleep(int(orders.get("step_ms", 0)) / 1000)
                if orders.get("kill") == str(number):
                    self.engine.is_running = False
                if str(number) in (orders.get("fail"), orders.get("kill")):
                    yield tuple(self._end(request, i, prompt, cached, number, FinishReason.ERROR) for i in branches)
                    return
                if request.session_id not in self.engine.kept:
                    yield tuple(self._end(request, i, prompt, cached, number, FinishReason.CANCELLED) for i in branches)
                    return
                yield tuple(_delta(request, i, word if number == 0 else f" {word}") for i in branches)
            self._note(request, num_tokens=prompt + len(words), num_cached_tokens=prompt + len(words))
            yield tuple(self._end(request, i, prompt, cached, len(words), FinishReason.STOP) for i in branches)
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(request.session_id)
            raise
        finally:
            self._note(request, is_active=False)

    def _begin(self, request: ChatRequest) -> tuple[int, int]:
        prompt = len(_text(request).split())
        info = self.engine.kept.get(request.session_id) or SessionInfo(request.session_id, 0, 0, 1, 0, False, 0.0)
        self.engine.kept[request.session_id] = replace(info, num_turns=info.num_turns + 1, is_active=True)
        return prompt, min(info.num_cached_tokens, prompt - 1)

    def _note(self, request: ChatRequest, **changes: object) -> None:
        if request.session_id in self.engine.kept:
            self.engine.kept[request.session_id] = replace(self.engine.kept[request.session_id], **changes)

    def _end(
        self, request: ChatRequest, index: int, prompt: int, cached: int, count: int, reason: FinishReason
    ) -> AnswerEnded:
        report = QualityReport(Mode.SPARSE, 0.9, 0.5, 10.0, 20.0, 0.25, 2, 1, 3)
        error = "failed as asked" if reason is FinishReason.ERROR else None
        return AnswerEnded(index, reason, TurnUsage(prompt, cached, count, report), error)


def fake_backend(config: EngineConfig, stats: StatsSink, *, num_threads: int) -> Backend:
    """Factory, by dotted path `fake_backend:fake_backend`."""
    if config.model == "unsupported":
        raise loopserve.errors.UnsupportedModel("the model needs what nobody has")
    engine = FakeEngine()
    return Backend(engine, FakeChat(engine))


def _delta(request: ChatRequest, index: int, text: str) -> AnswerDelta:
    if request.sampling.top_logprobs is None:
        return AnswerDelta(index, text, 1, ())
    others = tuple(TokenText(f"alt{n}", b"alt", -2.0 - n, ()) for n in range(request.sampling.top_logprobs))
    return AnswerDelta(index, text, 1, (TokenText(text, text.encode(), -0.5, others),))


def _text(request: ChatRequest) -> str:
    if request.messages is not None:
        return " ".join(message.content for message in request.messages)
    return request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt or ()))


def _orders(request: ChatRequest) -> dict[str, str]:
    last = request.messages[-1].content if request.messages is not None else _text(request)
    return dict(re.findall(r"(\w+)=(\w+)", last))
