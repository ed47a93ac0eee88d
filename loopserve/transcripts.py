"""The token history of each session: which ids its rendered conversation really consists of. A part of hop 4; knows no engine, no KV.

A chat template may rewrite history, and text may tokenise differently from what was generated. So transcripts of past turns are kept: their
token ids with *marks*, places where the rendered text so far and the token ids so far belong together.

    text   | system and turns before | user ... assistant: | the answer | end of turn, user ... assistant: |
    marks                            ^         prompt's end ^            ^ answer's end      prompt's end ^
    ids    | reused as they were, up to the longest mark whose text the new rendering repeats | the rest, tokenised anew |

A mark keeps a digest of its text, not the text. What follows the last common mark is the engine's business: it takes the longest common
token prefix with what it has cached.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from jinja2 import TemplateError

from loopserve.detokenizer import AnswerText, Vocabulary
from loopserve.dialogue import Message, SessionId, TokenId
from loopserve.errors import InvalidRequest

DIGEST_BYTES = 16
TRANSCRIPTS_PER_SESSION = 8  # branches and edits of one conversation
_TOKENS_MAX = 1 << 25  # of all sessions together, 4 bytes each: 128 MiB
_SAMPLE_DIALOGUE = (
    Message("user", "Hello  there! Was ist 2+2?\n\n"),
    Message("assistant", "It's four, \n naïve 你好🤖."),
    Message("user", " And 3*3?"),
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a conversation where so many characters of text are so many tokens; `digest` is of all text before it."""

    num_chars: int
    num_tokens: int
    digest: bytes  # 16


@dataclass(frozen=True, slots=True)
class Transcript:
    """The token ids of a conversation up to its last mark; marks ascend. Nobody changes the array."""

    token_ids: "array[int]"  # of 4 bytes
    marks: tuple[Mark, ...]

    def fault(self) -> str | None:
        """What no transcript can be, of one that came from somewhere else; None where it may be one."""
        places = [(mark.num_chars, mark.num_tokens) for mark in self.marks]
        if not places or min(min(place) for place in places) < 0:
            return "it has no marks, or one before its beginning"
        if any(after < before for pair in pairwise(places) for before, after in zip(*pair, strict=True)):
            return "its marks do not ascend"
        if places[-1][1] != len(self.token_ids):
            return f"its last mark is at {places[-1][1]} of {len(self.token_ids)} tokens"
        if any(len(mark.digest) != DIGEST_BYTES for mark in self.marks):
            return f"a digest is not {DIGEST_BYTES} bytes long"
        return None

    def holds(self, other: "Transcript") -> bool:
        """Whether the other is a beginning of this one and can serve nothing that this one cannot."""
        return set(other.marks) <= set(self.marks) and self.token_ids[: len(other.token_ids)] == other.token_ids


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's ids, and what is needed to carry its transcript on; the latter only where texts can be told from ids."""

    token_ids: tuple[TokenId, ...]
    transcript: Transcript | None = None
    digest: "hashlib.blake2b | None" = None  # of the prompt's text


class TokenHistory:
    """Prompts as token ids that continue what their session really said. Safe from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, *, max_sessions: int) -> None:
        """Beyond `max_sessions` the least recently used session is forgotten. `vocabulary` is the tokenizer's."""
        self._vocabulary = vocabulary
        self._num_ids = len(tokenizer)
        self._renderer = _Renderer(tokenizer)
        self._transcripts = _Transcripts(max_sessions, _TOKENS_MAX)

    def of_messages(self, session_id: SessionId, messages: Sequence[Message]) -> Prompt:
        """The conversation up to where the answer begins. Raises InvalidRequest where the model's template refuses it."""
        return self._prompt(session_id, self._renderer.render(messages), is_chat=True)

    def of_text(self, session_id: SessionId, text: str) -> Prompt:
        """A plain text to be continued. Raises InvalidRequest for text that is not valid Unicode."""
        return self._prompt(session_id, text, is_chat=False)

    def add_answer(self, session_id: SessionId, prompt: Prompt, answer: AnswerText) -> None:
        """Remember what was answered to a prompt of this session, unless the session was forgotten since."""
        transcript = self._with_answer(prompt, answer)
        if transcript is not None and prompt.transcript is not None:
            self._transcripts.add(session_id, transcript, behind=prompt.transcript)

    def export(self, session_id: SessionId) -> tuple[Transcript, ...]:
        """What is kept of a session, newest first; it stays here."""
        return self._transcripts.of(session_id)

    def adopt(self, session_id: SessionId, transcripts: Sequence[Transcript]) -> None:
        """Keep what another replica of the same model has exported, behind whatever the session has said here.

        One with an id that the tokenizer does not have is left out: its text is tokenised anew then.
        """
        known = [t for t in transcripts if max(t.token_ids, default=0) < self._num_ids]
        if known:
            self._transcripts.adopt(session_id, known)

    def forget(self, session_id: SessionId) -> None:
        """Drop all of a session; unknown ones are ignored."""
        self._transcripts.forget(session_id)

    def _prompt(self, session_id: SessionId, text: str, *, is_chat: bool) -> Prompt:
        """The session's own ids up to the longest mark that the text repeats, a new tokenisation from there."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        if not self._renderer.is_split_safe:
            return Prompt(self._renderer.encode(text, with_special=not is_chat))
        digest = hashlib.blake2b(b"chat" if is_chat else b"text", digest_size=DIGEST_BYTES)
        past = self._transcripts.longest(session_id, text, digest)
        if past.marks:
            rest = self._renderer.encode_rest(text[past.marks[-1].num_chars :])
        else:
            rest = self._renderer.encode(text, with_special=not is_chat)
        token_ids = (*past.token_ids, *rest)
        mark = Mark(len(text), len(token_ids), digest.digest())
        marks = past.marks if mark in past.marks else (*past.marks, mark)
        transcript = Transcript(array("I", token_ids), marks)
        self._transcripts.add(session_id, transcript)
        return Prompt(token_ids, transcript, digest)

    def _with_answer(self, prompt: Prompt, answer: AnswerText) -> Transcript | None:
        """The transcript with marks in the answer, where its trailing white space begins (templates like to trim) and where its visible
        text ends; None if no mark fits.

        The special token that ended the answer needs none: where the template writes it, its text is tokenised to just that token.
        """
        if prompt.transcript is None or prompt.digest is None or not self._vocabulary.is_exact:
            return None
        special = [self._vocabulary.is_special(token_id) for token_id in answer.token_ids]
        num_plain = min([*special, True].index(True), answer.num_visible_tokens)
        pieces = [self._vocabulary.token_bytes(token_id) for token_id in answer.token_ids[:num_plain]]
        raw = _valid_start(b"".join(pieces))
        ends = [0, *accumulate(len(piece) for piece in pieces)]
        limits = (len(raw.decode().rstrip().encode()), len(raw))
        counts = {max(n for n, end in enumerate(ends) if end <= limit and _is_boundary(raw, end)) for limit in limits}
        digest, marks, num_chars, start = prompt.digest.copy(), [], prompt.transcript.marks[-1].num_chars, 0
        for count in sorted(counts - {0}):
            part = b"".join(pieces[start:count])
            digest.update(part)
            num_chars += len(part.decode())
            marks.append(Mark(num_chars, len(prompt.token_ids) + count, digest.digest()))
            start = count
        if not marks:
            return None
        token_ids = prompt.transcript.token_ids + array("I", answer.token_ids[:start])
        return Transcript(token_ids, (*prompt.transcript.marks, *marks))


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


class _Transcripts:
    """The transcripts of all sessions, a few each, bounded in sessions and in tokens. Safe from any thread."""

    def __init__(self, max_sessions: int, max_tokens: int) -> None:
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._lock = threading.Lock()
        self._sessions: OrderedDict[SessionId, tuple[Transcript, ...]] = OrderedDict()  # least recently used first

    def longest(self, session_id: SessionId, text: str, digest: "hashlib.blake2b") -> Transcript:
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
        best = Transcript(array("I"), ())
        for transcript in transcripts:
            marks = tuple(m for m in transcript.marks if digests.get(m.num_chars) == m.digest)
            if marks and (not best.marks or marks[-1].num_chars > best.marks[-1].num_chars):
                best = Transcript(transcript.token_ids[: marks[-1].num_tokens], marks)
        return best

    def add(self, session_id: SessionId, transcript: Transcript, *, behind: Transcript | None = None) -> None:
        """Keep a transcript as the session's newest; beginnings of it are dropped, as is what exceeds the limits.

        `behind`: only where that one is still kept.
        """
        with self._lock:
            if behind is not None and not any(t.holds(behind) for t in self._sessions.get(session_id, ())):
                return
            old = self._take_out(session_id)
            if any(other.holds(transcript) for other in old):
                new = old
            else:
                new = (transcript, *(other for other in old if not transcript.holds(other)))[:TRANSCRIPTS_PER_SESSION]
            self._put_in(session_id, new)

    def of(self, session_id: SessionId) -> tuple[Transcript, ...]:
        """All of a session, newest first."""
        with self._lock:
            return self._sessions.get(session_id, ())

    def adopt(self, session_id: SessionId, transcripts: Sequence[Transcript]) -> None:
        """Keep transcripts from elsewhere as older than all that the session has here."""
        with self._lock:
            kept = list(self._take_out(session_id))
            for transcript in transcripts:
                if not any(other.holds(transcript) for other in kept):
                    kept.append(transcript)
            self._put_in(session_id, tuple(kept[:TRANSCRIPTS_PER_SESSION]))

    def forget(self, session_id: SessionId) -> None:
        """Drop all of a session."""
        with self._lock:
            self._take_out(session_id)

    def _put_in(self, session_id: SessionId, transcripts: tuple[Transcript, ...]) -> None:
        """As the most recently used session; what exceeds the limits goes."""
        self._sessions[session_id] = transcripts
        self._num_tokens += sum(len(t.token_ids) for t in transcripts)
        while len(self._sessions) > self._max_sessions or self._num_tokens > self._max_tokens:
            self._take_out(next(iter(self._sessions)))

    def _take_out(self, session_id: SessionId) -> tuple[Transcript, ...]:
        transcripts = self._sessions.pop(session_id, ())
        self._num_tokens -= sum(len(t.token_ids) for t in transcripts)
        return transcripts


def _valid_start(raw: bytes) -> bytes:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start]
    return raw


def _is_boundary(raw: bytes, at: int) -> bool:
    return at == len(raw) or (at < len(raw) and raw[at] & 0xC0 != 0x80)
