"""Messages to token ids and token ids to text: hops 4 and 11 of a turn. Owns the token history of each session; knows no KV, no HTTP.

A chat template may rewrite history, and text may tokenise differently from what was generated. So the service keeps *transcripts*: the
token ids of past turns with *marks*, places where the rendered text so far and the token ids so far belong together.

    text   | system and turns before | user ... assistant:| the answer | end of turn |
    marks                            ^      prompt's end ^            ^             ^
    ids    | reused as they were, up to the longest mark whose text the new rendering repeats | the rest, tokenised anew |

A mark keeps a digest of its text, not the text. What follows the last common mark is the engine's business: it takes the longest common
token prefix with what it has cached.
"""

import asyncio
import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol

from jinja2 import TemplateError

from loopserve.detokenizer import StopScanner, TextStream, Vocabulary
from loopserve.dialogue import (
    FinishReason,
    Message,
    PositionLogprobs,
    QualityContract,
    QualityReport,
    SamplingParams,
    SessionId,
    TokenId,
    TokenLogprob,
    TokensGenerated,
    TurnEnded,
    TurnEvent,
    TurnId,
    TurnRequest,
    TurnStarted,
    TurnUsage,
)
from loopserve.errors import InvalidRequest

_THREAD_ABOVE_CHARS = 20_000  # rendering and tokenising more than this would hold up the other streams of the event loop
_TRANSCRIPTS_PER_SESSION = 8  # branches and edits of one conversation
_TRANSCRIPT_TOKENS_MAX = 1 << 25  # of all sessions together, 4 bytes each: 128 MiB
_ALIVE_CHECK_S = 5.0  # how often a silent stream asks whether the engine still lives
_SAMPLE_DIALOGUE = (
    Message("user", "Hello  there! Was ist 2+2?\n\n"),
    Message("assistant", "It's four, \n naïve 你好🤖."),
    Message("user", " And 3*3?"),
)


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


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as OpenAI's `logprobs` show it. `token_bytes` are exact where `token` cannot be (half a character)."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple["TokenText", ...] = ()


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

    def submit(
        self, request: TurnRequest, on_events: Callable[[Sequence[TurnEvent]], None]
    ) -> tuple[TurnId, ...]:
        """Accept a turn; one id a branch. Events come on the engine's thread."""

    def cancel(self, turn_id: TurnId, *, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a turn; its TurnEnded still comes."""


class ChatService:
    """Turns requests into answers, as text. One per engine; `stream` runs on event loops, the rest on any thread."""

    def __init__(self, engine: TurnEngine, *, max_transcripts: int = 4096) -> None:
        """`max_transcripts` bounds the sessions whose token history is kept; beyond it the least recently used is forgotten."""
        self._engine = engine
        self._vocabulary = Vocabulary(engine.tokenizer)
        self._renderer = _Renderer(engine.tokenizer)
        self._history = _History(max_transcripts, _TRANSCRIPT_TOKENS_MAX)

    async def stream(self, request: ChatRequest) -> AsyncIterator[tuple[ChatEvent, ...]]:
        """Answer one request; each item holds everything that was waiting.

        Raises errors of `loopserve.errors` before the first item, never after it. Closing the generator cancels its turns in the engine.
        """
        _check(request)
        prompt = await self._prepared(request)
        inbox = _Inbox(asyncio.get_running_loop())
        turn = TurnRequest(
            session_id=request.session_id,
            prompt_ids=prompt.token_ids,
            sampling=request.sampling,
            contract=request.contract,
            num_branches=request.num_branches,
            cache_salt=request.cache_salt,
        )
        branches = {
            turn_id: self._branch(index, request, prompt)
            for index, turn_id in enumerate(self._engine.submit(turn, inbox.put))
        }
        try:
            while not all(branch.is_ended for branch in branches.values()):
                self._take_in(await inbox.take(_ALIVE_CHECK_S), branches)
                item = tuple(event for branch in branches.values() for event in branch.drain())
                for branch in branches.values():
                    self._remember(request.session_id, prompt, branch)
                if item:
                    yield item
        finally:
            inbox.close()
            for turn_id, branch in branches.items():
                if not branch.is_ended:
                    self._engine.cancel(turn_id)
                    branch.abandon()
                    self._remember(request.session_id, prompt, branch)

    def forget(self, session_id: SessionId) -> None:
        """Drop the token history of a session; its next turn is tokenised from text."""
        self._history.forget(session_id)

    def _branch(self, index: int, request: ChatRequest, prompt: "_Prompt") -> "_Branch":
        text = self._vocabulary.stream(is_continuation=request.messages is None)
        return _Branch(index, request, len(prompt.token_ids), text, self._vocabulary)

    def _take_in(self, events: Sequence[TurnEvent], branches: dict[TurnId, "_Branch"]) -> None:
        """Hand events to their branches; end every branch if nothing came because the engine is dead."""
        for event in events:
            branch = branches.get(event.turn_id)
            if branch is None or branch.is_ended:
                continue
            was_stopped = branch.is_stopped
            branch.take(event)
            if branch.is_stopped and not was_stopped and not branch.is_ended:
                self._engine.cancel(event.turn_id, reason=FinishReason.STOP)
        if not events and not self._engine.is_alive():
            for branch in branches.values():
                branch.fail("the engine died before the answer was complete")

    async def _prepared(self, request: ChatRequest) -> "_Prompt":
        num_chars = sum(len(message.content) for message in request.messages or ())
        num_chars += len(request.prompt) if isinstance(request.prompt, str) else 0
        if num_chars > _THREAD_ABOVE_CHARS:
            return await asyncio.to_thread(self._prepare, request)
        return self._prepare(request)

    def _prepare(self, request: ChatRequest) -> "_Prompt":
        """The prompt's token ids: the session's own up to the longest mark that the text repeats, a new tokenisation from there."""
        if isinstance(request.prompt, tuple):
            return _Prompt(request.prompt)
        is_chat = request.messages is not None
        text = self._renderer.render(request.messages) if request.messages is not None else request.prompt
        assert text is not None, "_check has seen to it"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        if not self._renderer.is_split_safe:
            return _Prompt(tuple(self._renderer.encode(text, is_start=True, with_special=not is_chat)))
        digest = hashlib.blake2b(b"chat" if is_chat else b"text", digest_size=16)
        past = self._history.longest(request.session_id, text, digest)
        num_chars, num_tokens = (past.marks[-1].num_chars, past.marks[-1].num_tokens) if past.marks else (0, 0)
        rest = self._renderer.encode(
            text[num_chars:], is_start=num_chars == 0, with_special=num_chars == 0 and not is_chat
        )
        token_ids = (*past.token_ids[:num_tokens], *rest)
        mark = _Mark(len(text), len(token_ids), digest.digest())
        marks = past.marks if past.marks and past.marks[-1] == mark else (*past.marks, mark)
        prompt = _Prompt(token_ids, _Transcript(array("I", token_ids), marks), digest)
        self._history.add(request.session_id, _Transcript(prompt.transcript.token_ids, marks))
        return prompt

    def _remember(self, session_id: SessionId, prompt: "_Prompt", branch: "_Branch") -> None:
        """Add an ended branch to the session's history, once."""
        if not branch.is_ended or branch.is_remembered:
            return
        branch.is_remembered = True
        marks = _answer_marks(prompt, branch, self._vocabulary) if prompt.digest is not None else ()
        if marks:
            num_answer = marks[-1].num_tokens - len(prompt.token_ids)
            token_ids = prompt.transcript.token_ids + array("I", branch.token_ids[:num_answer])
            self._history.add(session_id, _Transcript(token_ids, (*prompt.transcript.marks, *marks)))
