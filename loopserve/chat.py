"""Messages to token ids and token ids to text: hops 4 and 11 of a turn. Owns the token history of each session; knows no KV, no HTTP.

A chat template may rewrite history, and text may tokenise differently from what was generated. So the service keeps *transcripts*: the
token ids of past turns with *marks*, places where the rendered text so far and the token ids so far belong together.

    text   | system and turns before | user ... assistant: | the answer | end of turn, user ... assistant: |
    marks                            ^         prompt's end ^            ^ answer's end      prompt's end ^
    ids    | reused as they were, up to the longest mark whose text the new rendering repeats | the rest, tokenised anew |

A mark keeps a digest of its text, not the text. What follows the last common mark is the engine's business: it takes the longest common
token prefix with what it has cached.
"""

import asyncio
import hashlib
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, zip_longest
from typing import Any, Protocol

from jinja2 import TemplateError

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

_THREAD_ABOVE_CHARS = (
    20_000  # rendering and tokenising more than this would hold up the other streams of the event loop
)
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
    """Turns requests into answers, as text. One per engine; `stream` runs on event loops, `forget` on any thread."""

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

    def _submit(self, request: ChatRequest, prompt: "_Prompt", inbox: "_Inbox") -> dict[TurnId, "_Branch"]:
        turn = TurnRequest(
            session_id=request.session_id,
            prompt_ids=prompt.token_ids,
            sampling=request.sampling,
            contract=request.contract,
            num_branches=request.num_branches,
            cache_salt=request.cache_salt,
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
        text = request.prompt if request.messages is None else self._renderer.render(request.messages)
        assert text is not None, "_check has seen to it"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        if not self._renderer.is_split_safe:
            return _Prompt(self._renderer.encode(text, with_special=not is_chat))
        digest = hashlib.blake2b(b"chat" if is_chat else b"text", digest_size=16)
        past = self._history.longest(request.session_id, text, digest)
        if past.marks:
            rest = self._renderer.encode_rest(text[past.marks[-1].num_chars :])
        else:
            rest = self._renderer.encode(text, with_special=not is_chat)
        token_ids = (*past.token_ids, *rest)
        mark = _Mark(len(text), len(token_ids), digest.digest())
        marks = past.marks if mark in past.marks else (*past.marks, mark)
        transcript = _Transcript(array("I", token_ids), marks)
        self._history.add(request.session_id, transcript)
        return _Prompt(token_ids, transcript, digest)

    def _remember_ended(self, session_id: SessionId, prompt: "_Prompt", branches: dict[TurnId, "_Branch"]) -> None:
        """Add the branches that have ended to the session's history, each once."""
        for branch in branches.values():
            if branch.is_ended and not branch.is_remembered:
                branch.is_remembered = True
                transcript = prompt.with_answer(branch.answer, self._vocabulary)
                if transcript is not None:
                    self._history.add(session_id, transcript)


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


class _Renderer:
    """Messages to text by the model's template, and text to ids, whole or from a mark on."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = self._find_anchor()

    @property
    def is_split_safe(self) -> bool:
        """Whether a text may be tokenised in two parts without changing what it says. Where not, every prompt is tokenised whole."""
        return self._anchor is not None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model reads it, up to where its answer begins. Raises InvalidRequest with the template's own words."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "this model has no chat template, so it cannot take messages; send text to /v1/completions",
                param="messages",
            )
        dialogue = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def encode(self, text: str, *, with_special: bool) -> tuple[TokenId, ...]:
        """Ids of a whole text; `with_special` adds what the tokenizer puts around a text (a chat template writes that itself)."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=with_special, verbose=False))

    def encode_rest(self, text: str) -> tuple[TokenId, ...]:
        """Ids of the rest of a text whose beginning is tokenised already. Only where `is_split_safe`."""
        assert self._anchor is not None, "this tokenizer needs whole texts"
        return self._encode_behind(self._anchor, text)

    def _encode_behind(self, anchor: str, text: str) -> tuple[TokenId, ...]:
        num_anchor_ids = len(self.encode(anchor, with_special=False)) if anchor else 0
        return self.encode(anchor + text, with_special=False)[num_anchor_ids:]

    def _find_anchor(self) -> str | None:
        """What has to stand before a rest so that it is tokenised as mid-text: nothing for byte-level tokenizers, a special token for those
        that put a space before a text; None if neither works. Tried out, at every place of a sample conversation."""
        try:
            sample = self.render(_SAMPLE_DIALOGUE)
        except InvalidRequest:
            sample = "\n".join(message.content for message in _SAMPLE_DIALOGUE)
        specials = (self._tokenizer.bos_token, self._tokenizer.eos_token, self._tokenizer.unk_token)
        return next((anchor for anchor in ("", *filter(None, specials)) if self._splits_anywhere(sample, anchor)), None)

    def _splits_anywhere(self, text: str, anchor: str) -> bool:
        whole = self._decode(self.encode(text, with_special=False))
        return all(
            self._decode(self.encode(text[:at], with_special=False) + self._encode_behind(anchor, text[at:])) == whole
            for at in range(1, len(text))
        )

    def _decode(self, token_ids: Sequence[TokenId]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place in a conversation where so many characters of text are so many tokens; `digest` is of all text before it."""

    num_chars: int
    num_tokens: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Transcript:
    """The token ids of a conversation up to its last mark; marks ascend."""

    token_ids: "array[int]"
    marks: tuple[_Mark, ...]

    def holds(self, other: "_Transcript") -> bool:
        """Whether the other is a beginning of this one and can serve nothing that this one cannot."""
        return set(other.marks) <= set(self.marks) and self.token_ids[: len(other.token_ids)] == other.token_ids


class _History:
    """The transcripts of all sessions, a few each, bounded in sessions and in tokens. Safe from any thread."""

    def __init__(self, max_sessions: int, max_tokens: int) -> None:
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._lock = threading.Lock()
        self._sessions: OrderedDict[SessionId, tuple[_Transcript, ...]] = OrderedDict()  # least recently used first

    def longest(self, session_id: SessionId, text: str, digest: "hashlib.blake2b") -> _Transcript:
        """The session's transcript, cut at the longest mark whose text begins `text`; empty if there is none.

        `digest` is fed with all of `text`, once, whatever the number of marks.
        """
        with self._lock:
            transcripts = self._sessions.get(session_id, ())
        places = sorted({m.num_chars for t in transcripts for m in t.marks if m.num_chars <= len(text)})
        digests: dict[int, bytes] = {}
        for start, end in pairwise((0, *places)):
            digest.update(text[start:end].encode())
            digests[end] = digest.digest()
        digest.update(text[places[-1] if places else 0 :].encode())
        best = _Transcript(array("I"), ())
        for transcript in transcripts:
            marks = tuple(m for m in transcript.marks if digests.get(m.num_chars) == m.digest)
            if marks and (not best.marks or marks[-1].num_chars > best.marks[-1].num_chars):
                best = _Transcript(transcript.token_ids[: marks[-1].num_tokens], marks)
        return best

    def add(self, session_id: SessionId, transcript: _Transcript) -> None:
        """Keep a transcript as the session's newest; beginnings of it are dropped, as is what exceeds the limits."""
        with self._lock:
            old = self._take_out(session_id)
            if any(other.holds(transcript) for other in old):
                new = old
            else:
                new = (transcript, *(other for other in old if not transcript.holds(other)))[:_TRANSCRIPTS_PER_SESSION]
            self._sessions[session_id] = new
            self._num_tokens += sum(len(t.token_ids) for t in new)
            while len(self._sessions) > self._max_sessions or self._num_tokens > self._max_tokens:
                self._take_out(next(iter(self._sessions)))

    def forget(self, session_id: SessionId) -> None:
        """Drop all of a session."""
        with self._lock:
            self._take_out(session_id)

    def _take_out(self, session_id: SessionId) -> tuple[_Transcript, ...]:
        transcripts = self._sessions.pop(session_id, ())
        self._num_tokens -= sum(len(t.token_ids) for t in transcripts)
        return transcripts


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt's ids, and what is needed to carry its transcript on; the latter only where texts can be told from ids."""

    token_ids: tuple[TokenId, ...]
    transcript: _Transcript | None = None
    digest: "hashlib.blake2b | None" = None  # of the prompt's text

    def with_answer(self, answer: AnswerText, vocabulary: Vocabulary) -> _Transcript | None:
        """The transcript with marks in the answer, where its trailing white space begins (templates like to trim) and where its visible
        text ends; None if no mark fits.

        The special token that ended the answer needs none: where the template writes it, its text is tokenised to just that token.
        """
        if self.transcript is None or self.digest is None or not vocabulary.is_exact:
            return None
        special = [vocabulary.is_special(token_id) for token_id in answer.token_ids]
        num_plain = min([*special, True].index(True), answer.num_visible_tokens)
        pieces = [vocabulary.token_bytes(token_id) for token_id in answer.token_ids[:num_plain]]
        raw = _valid_start(b"".join(pieces))
        ends = [0, *accumulate(len(piece) for piece in pieces)]
        limits = (len(raw.decode().rstrip().encode()), len(raw))
        counts = {max(n for n, end in enumerate(ends) if end <= limit and _is_boundary(raw, end)) for limit in limits}
        digest, marks, num_chars, start = self.digest.copy(), [], self.transcript.marks[-1].num_chars, 0
        for count in sorted(counts - {0}):
            part = b"".join(pieces[start:count])
            digest.update(part)
            num_chars += len(part.decode())
            marks.append(_Mark(num_chars, len(self.token_ids) + count, digest.digest()))
            start = count
        if not marks:
            return None
        token_ids = self.transcript.token_ids + array("I", answer.token_ids[:start])
        return _Transcript(token_ids, (*self.transcript.marks, *marks))


def _valid_start(raw: bytes) -> bytes:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start]
    return raw


def _is_boundary(raw: bytes, at: int) -> bool:
    return at == len(raw) or (at < len(raw) and raw[at] & 0xC0 != 0x80)


def _check(request: ChatRequest) -> None:
    """Raise InvalidRequest for what no engine could answer."""
    if (request.messages is None) is (request.prompt is None):
        raise InvalidRequest("give either messages or a prompt, and not both")
    if request.messages is not None and not request.messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    if not all(request.stop):
        raise InvalidRequest("a stop string must not be empty: it would end every answer at once", param="stop")
