"""Messages to token ids and token ids to text: hops 4 and 11 of a turn. Owns the way of one request through the engine and back; the ids
that text becomes are `loopserve.transcripts`' business, the text that ids become is `loopserve.detokenizer`'s. Knows no KV, no HTTP.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol

from loopserve.detokenizer import AnswerText, TokenText, Vocabulary
from loopserve.dialogue import (
    FinishReason,
    Message,
    QualityContract,
    QualityReport,
    SamplingParams,
    SessionId,
    TokenId,
    TokensGenerated,
    TurnEnded,
    TurnEvent,
    TurnId,
    TurnRequest,
    TurnStarted,
    TurnUsage,
)
from loopserve.errors import InvalidRequest
from loopserve.transcripts import Prompt, TokenHistory, Transcript

__all__ = [
    "AnswerDelta",
    "AnswerEnded",
    "AnswerStarted",
    "ChatEvent",
    "ChatRequest",
    "ChatService",
    "TokenText",
    "TurnEngine",
]

_THREAD_ABOVE_CHARS = 20_000  # rendering and tokenising more would hold up the other streams of the event loop
_ALIVE_CHECK_S = 5.0  # how often a silent stream asks whether the engine still lives


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request for `num_branches` answers. Exactly one of `messages` and `prompt` is given; a prompt of ids is taken as it is."""

    session_id: SessionId
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[TokenId, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    contract: QualityContract = field(default_factory=QualityContract)
    stop: tuple[str, ...] = ()
    num_branches: int = 1
    cache_salt: str = ""
    trace_parent: str = ""  # opaque: comes back with the turn's stats


@dataclass(frozen=True, slots=True)
class AnswerStarted:
    """The branch was admitted to the batch; comes at most once, first."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    rectified_tokens: int


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """More text of one branch. `num_tokens` were taken in since the last delta; `logprobs` are of those tokens whose text is out."""

    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerEnded:
    """The branch is over; exactly one an index, its last event. `error` is set when `reason` is ERROR."""

    index: int
    reason: FinishReason
    usage: TurnUsage
    error: str | None = None


ChatEvent = AnswerStarted | AnswerDelta | AnswerEnded


class TurnEngine(Protocol):
    """What the chat service needs of `loopserve.engine.Engine`."""

    @property
    def tokenizer(self) -> Any:
        """The fast Hugging Face tokenizer."""

    def is_alive(self) -> bool:
        """Whether turns are still being computed."""

    def submit(self, request: TurnRequest, on_events: Callable[[Sequence[TurnEvent]], None]) -> tuple[TurnId, ...]:
        """Accept a turn; one id a branch. Events come on the engine's thread."""

    def cancel(self, turn_id: TurnId, *, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a turn; its TurnEnded still comes."""


class ChatService:
    """Turns requests into answers, as text. One per engine; `stream` runs on event loops, all else on any thread."""

    def __init__(self, engine: TurnEngine, *, max_transcripts: int = 4096) -> None:
        """`max_transcripts` bounds the sessions whose token history is kept; beyond it the least recently used is forgotten."""
        self._engine = engine
        self._vocabulary = Vocabulary(engine.tokenizer)
        self._history = TokenHistory(engine.tokenizer, self._vocabulary, max_sessions=max_transcripts)

    async def stream(self, request: ChatRequest) -> AsyncIterator[tuple[ChatEvent, ...]]:
        """Answer one request; each item holds everything that was waiting.

        Raises errors of `loopserve.errors` before the first item, never after it. Closing the generator cancels its turns in the engine.
        """
        _check(request)
        prompt = await self._prepared(request)
        inbox = _Inbox(asyncio.get_running_loop())
        branches = self._submit(request, prompt, inbox)
        try:
            while not all(branch.is_ended for branch in branches.values()):
                events = await inbox.take(_ALIVE_CHECK_S)
                self._take_in(events, branches)
                item = tuple(event for branch in branches.values() for event in branch.drain())
                self._remember_ended(request.session_id, prompt, branches)
                if item:
                    yield item
        finally:
            inbox.close()
            for turn_id, branch in branches.items():
                if not branch.is_ended:
                    self._engine.cancel(turn_id)
                    branch.end(FinishReason.CANCELLED)
            self._remember_ended(request.session_id, prompt, branches)

    def forget(self, session_id: SessionId) -> None:
        """Drop the token history of a session; its next turn is tokenised from its text. Unknown sessions are ignored."""
        self._history.forget(session_id)

    def export(self, session_id: SessionId) -> tuple[Transcript, ...]:
        """The token history of a session, for another replica of the same model; empty where there is none. It stays here."""
        return self._history.export(session_id)

    def adopt(self, session_id: SessionId, transcripts: Sequence[Transcript]) -> None:
        """Take over what another replica has exported, so that known text keeps the ids it had there. What was said here counts first."""
        self._history.adopt(session_id, transcripts)

    def _submit(self, request: ChatRequest, prompt: Prompt, inbox: "_Inbox") -> dict[TurnId, "_Branch"]:
        turn = TurnRequest(
            session_id=request.session_id,
            prompt_ids=prompt.token_ids,
            sampling=request.sampling,
            contract=request.contract,
            num_branches=request.num_branches,
            cache_salt=request.cache_salt,
            trace_parent=request.trace_parent,
        )
        turn_ids = self._engine.submit(turn, inbox.put)
        return {
            turn_id: _Branch(
                index,
                AnswerText(self._vocabulary, request.stop, is_continuation=request.messages is None),
                TurnUsage(len(prompt.token_ids), 0, 0, QualityReport(request.contract.mode)),
            )
            for index, turn_id in enumerate(turn_ids)
        }

    def _take_in(self, events: Sequence[TurnEvent], branches: dict[TurnId, "_Branch"]) -> None:
        """Hand events to their branches, end turns at stop strings, and end all of them if nothing came because the engine is dead."""
        for event in events:
            branch = branches.get(event.turn_id)
            if branch is None or branch.is_ended:
                continue
            was_stopped = branch.answer.is_stopped
            branch.take(event)
            if branch.answer.is_stopped and not was_stopped and not branch.is_ended:
                self._engine.cancel(event.turn_id, reason=FinishReason.STOP)
        if not events and not self._engine.is_alive():
            for branch in branches.values():
                if not branch.is_ended:
                    branch.end(FinishReason.ERROR, error="the engine died before the answer was complete")

    async def _prepared(self, request: ChatRequest) -> Prompt:
        num_chars = sum(len(message.content) for message in request.messages or ())
        num_chars += len(request.prompt) if isinstance(request.prompt, str) else 0
        if num_chars > _THREAD_ABOVE_CHARS:
            return await asyncio.to_thread(self._prepare, request)
        return self._prepare(request)

    def _prepare(self, request: ChatRequest) -> Prompt:
        if request.messages is not None:
            return self._history.of_messages(request.session_id, request.messages)
        if isinstance(request.prompt, str):
            return self._history.of_text(request.session_id, request.prompt)
        assert request.prompt is not None, "_check has seen to it"
        return Prompt(request.prompt)

    def _remember_ended(self, session_id: SessionId, prompt: Prompt, branches: dict[TurnId, "_Branch"]) -> None:
        """Add the branches that have ended to the session's history, each once."""
        for branch in branches.values():
            if branch.is_ended and not branch.is_remembered:
                branch.is_remembered = True
                self._history.add_answer(session_id, prompt, branch.answer)


class _Branch:
    """One answer on its way out: what its events have brought and nobody has drained yet."""

    def __init__(self, index: int, answer: AnswerText, usage: TurnUsage) -> None:
        self.answer = answer
        self.is_ended = False
        self.is_remembered = False
        self._index = index
        self._usage = usage  # as far as known without the engine's TurnEnded
        self._is_started = False
        self._edges: deque[AnswerStarted | AnswerEnded] = deque()

    def take(self, event: TurnEvent) -> None:
        """Take in one event of the engine."""
        match event:
            case TurnStarted() if not self._is_started:
                self._is_started = True
                self._usage = replace(self._usage, cached_tokens=event.cached_tokens)
                prompt_tokens = self._usage.prompt_tokens
                self._edges.append(
                    AnswerStarted(self._index, prompt_tokens, event.cached_tokens, event.rectified_tokens)
                )
            case TokensGenerated():
                for token_id, logprobs in zip_longest(event.token_ids, event.logprobs):
                    self.answer.push(token_id, logprobs)
            case TurnEnded():
                for token_id in event.token_ids[len(self.answer.token_ids) :]:
                    self.answer.push(token_id)
                self.end(event.reason, usage=event.usage, error=event.error)

    def end(self, reason: FinishReason, *, usage: TurnUsage | None = None, error: str | None = None) -> None:
        """End the branch; a complete stop string outweighs whatever else ended it."""
        assert not self.is_ended, "a branch ends once"
        self.is_ended = True
        self.answer.finish()
        num_tokens = len(self.answer.token_ids)
        if self.answer.is_stopped:
            reason, error = FinishReason.STOP, None
            usage = replace(usage or self._usage, completion_tokens=num_tokens)
        self._edges.append(
            AnswerEnded(self._index, reason, usage or replace(self._usage, completion_tokens=num_tokens), error)
        )

    def drain(self) -> Iterator[ChatEvent]:
        """What is new: started, one delta, ended."""
        if self._edges and isinstance(self._edges[0], AnswerStarted):
            yield self._edges.popleft()
        if (delta := self.answer.take()) is not None:
            yield AnswerDelta(self._index, delta.text, delta.num_tokens, delta.logprobs)
        if self._edges:
            yield self._edges.popleft()


class _Inbox:
    """Hands the engine thread's events over to one event loop, with at most one wake-up for all that waits. It holds no more than what
    its turns may generate."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._events: list[TurnEvent] = []
        self._is_woken = False
        self._is_closed = False

    def put(self, events: Sequence[TurnEvent]) -> None:
        """Engine thread: leave events; dropped once the inbox or its loop is closed."""
        with self._lock:
            if self._is_closed:
                return
            self._events.extend(events)
            if self._is_woken:
                return
            self._is_woken = True
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop is closed: nobody will read this any more
            self.close()

    async def take(self, timeout_s: float) -> list[TurnEvent]:
        """Event loop: all that waits, at least one event; empty after `timeout_s` without any."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return []
        self._ready.clear()
        with self._lock:
            events, self._events = self._events, []
            self._is_woken = False
        return events

    def close(self) -> None:
        """Drop what waits and whatever still comes."""
        with self._lock:
            self._is_closed = True
            self._events.clear()


def _check(request: ChatRequest) -> None:
    """Raise InvalidRequest for what no engine could answer."""
    if (request.messages is None) is (request.prompt is None):
        raise InvalidRequest("give either messages or a prompt, and not both")
    if request.messages is not None and not request.messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    if not all(request.stop):
        raise InvalidRequest("a stop string must not be empty: it would end every answer at once", param="stop")
