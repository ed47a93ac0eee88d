"""Token ids to text, as they come, and the search for stop strings in it: the small machines of hop 11. Knows no engine, no
conversation, no torch.

    Vocabulary    what each id of one tokenizer spells, in bytes; built once
    TextStream    ids of one answer -> text that is never taken back and never ends inside a character
    StopScanner   that text -> text up to the first stop string; what may yet become one is held back
    AnswerText    both for one answer, with the log-probabilities of the tokens whose text is out
"""

import codecs
import json
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

from loopserve.dialogue import PositionLogprobs, TokenId, TokenLogprob

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>\Z")
_SAMPLES = ("Hello  world, it's\n\tfine.", " Grüße, 你好 🤖!", "x\n\n  y")


class TextStream(Protocol):
    """Incremental detokenisation of one answer: everything pushed out, joined, is the decoded answer without special tokens."""

    def push(self, token_id: TokenId) -> str:
        """The text that this token completes; empty while a character is incomplete."""

    def finish(self) -> str:
        """What was held back, with U+FFFD for an incomplete character. Nothing may be pushed afterwards."""


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How a tokenizer's decoder turns pieces into bytes, where it is one of the families that work piece by piece."""

    is_byte_level: bool = False  # GPT-2's: each character of a piece stands for one byte
    replacements: tuple[tuple[str, str], ...] = ()  # sentencepiece's: "▁" for " "
    has_byte_pieces: bool = False  # "<0xE4>" is one byte
    strip: str = ""  # a character taken from the start of the text ...
    strip_count: int = 0  # ... at most so often
    dropped_in_first_piece: str = ""  # Metaspace: not a space there, but nothing


class Vocabulary:
    """What each token id of one tokenizer spells. Immutable, so any thread may use it."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast Hugging Face tokenizer. Its decoder is recognised by its description and then tried on samples; one that is
        not recognised or fails a sample is streamed by the tokenizers library, and `is_exact` is False."""
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._spelling = _spelling_of(self._backend.decoder)
        if self._spelling is not None and not all(self._spells(sample) for sample in _SAMPLES):
            self._spelling = None

    @property
    def is_exact(self) -> bool:
        """Whether `token_bytes` of an answer's tokens, joined, are the bytes of its text."""
        return self._spelling is not None

    def is_special(self, token_id: TokenId) -> bool:
        """Whether the id is left out of text: end of turn and the like."""
        return token_id in self._special

    def token_bytes(self, token_id: TokenId) -> bytes:
        """The bytes that the token adds in mid-text; a special token's name; empty for an id that the tokenizer does not know."""
        if token_id in self._special:
            return str(self._special[token_id]).encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._spelling is None:
            return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()
        return _piece_bytes(piece, self._spelling)

    def stream(self, *, is_continuation: bool = False) -> TextStream:
        """A stream for one answer. A continuation keeps a leading space that the tokenizer would drop at the start of a text (only where
        `is_exact`)."""
        if self._spelling is None:
            return _LibraryStream(self._backend)
        return _ByteStream(self, self._spelling, self._backend, is_continuation)

    def _spells(self, sample: str) -> bool:
        token_ids = self._backend.encode(sample, add_special_tokens=False).ids
        stream = self.stream()
        text = "".join([*map(stream.push, token_ids), stream.finish()])
        return text == str(self._backend.decode(token_ids, skip_special_tokens=True))


class _ByteStream:
    """Exact: UTF-8 is decoded over the tokens' bytes as they come.

    A run of byte pieces that is not valid UTF-8 shows its valid characters, where the tokenizers library turns all of the run into U+FFFD:
    that would take back text already sent.
    """

    def __init__(self, vocabulary: Vocabulary, spelling: _Spelling, backend: Any, is_continuation: bool) -> None:
        self._vocabulary = vocabulary
        self._spelling = spelling
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._to_strip = 0 if is_continuation else spelling.strip_count
        self._is_first = not is_continuation

    def push(self, token_id: TokenId) -> str:
        if self._vocabulary.is_special(token_id):
            return ""
        if self._is_first and self._spelling.dropped_in_first_piece:
            return self._strip(self._utf8.decode(self._first_piece(token_id)))
        return self._strip(self._utf8.decode(self._vocabulary.token_bytes(token_id)))

    def finish(self) -> str:
        return self._strip(self._utf8.decode(b"", final=True))

    def _first_piece(self, token_id: TokenId) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        self._is_first = False
        return _piece_bytes(piece.replace(self._spelling.dropped_in_first_piece, ""), self._spelling)

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._spelling.strip):
                self._to_strip = 0
                break
            text = text[len(self._spelling.strip) :]
            self._to_strip -= 1
        return text


class _LibraryStream:
    """For decoders that look across pieces: the tokenizers library's own stream, and at the end one decoding of the whole answer."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream: Any = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[TokenId] = []
        self._sent = ""

    def push(self, token_id: TokenId) -> str:
        self._token_ids.append(token_id)
        if self._stream is None:
            return ""
        try:
            text = self._stream.step(self._backend, token_id) or ""
        except (
            Exception
        ):  # the library raises bare Exception where a decoder rewrites text it gave; the rest then comes in `finish`
            self._stream = None
            return ""
        self._sent += text
        return str(text)

    def finish(self) -> str:
        whole = str(self._backend.decode(self._token_ids, skip_special_tokens=True))
        return whole[len(self._sent) :] if whole.startswith(self._sent) else ""


class StopScanner:
    """Lets text through up to the stop string that is completed first; of two completed by one character, the longer.

    Which one that is does not depend on how the text is cut into pushes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` must not hold an empty string."""
        assert all(stops), "an empty stop string would end every answer"
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that is now known to stand before any stop string; nothing once stopped."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if matches:
            self.is_stopped, self._held = True, ""
            return held[: min(matches)[1]]
        keep = self._num_undecided(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, since no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(stop.startswith(text[len(text) - n :]) for stop in self._stops)), 0
        )


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as OpenAI's `logprobs` show it. `token_bytes` are exact where `token` cannot be (half a character)."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple["TokenText", ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What became visible of an answer. `num_tokens` were pushed since the last delta; `logprobs` are of tokens whose text is out."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenText, ...]


class AnswerText:
    """One answer on its way from ids to visible text. Tokens after a stop string are not taken in any more."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], *, is_continuation: bool = False) -> None:
        self.token_ids: list[TokenId] = []
        self._vocabulary = vocabulary
        self._stream = vocabulary.stream(is_continuation=is_continuation)
        self._scanner = StopScanner(stops)
        self._text_ends: list[int] = []  # characters streamed, stop strings included, after each token
        self._num_visible_chars = 0
        self._fresh_text: list[str] = []
        self._num_fresh_tokens = 0
        self._waiting: deque[tuple[int, TokenText]] = deque()  # with the place where the token's text begins

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string is complete; the last of `token_ids` completed it."""
        return self._scanner.is_stopped

    @property
    def num_visible_tokens(self) -> int:
        """How many of `token_ids`, from the first on, are wholly visible."""
        return bisect_right(self._text_ends, self._num_visible_chars)

    def push(self, token_id: TokenId, logprobs: PositionLogprobs | None = None) -> None:
        """Take in the next token; ignored once stopped."""
        if self.is_stopped:
            return
        start = self._text_ends[-1] if self._text_ends else 0
        text = self._stream.push(token_id)
        self.token_ids.append(token_id)
        self._text_ends.append(start + len(text))
        self._num_fresh_tokens += 1
        if logprobs is not None and not self._vocabulary.is_special(token_id):
            top = tuple(self._token_text(candidate) for candidate in logprobs.top)
            self._waiting.append((start, replace(self._token_text(logprobs.chosen), top=top)))
        self._show(self._scanner.push(text))

    def finish(self) -> None:
        """No more tokens come: let out what was held back, which may still complete a stop string. Called once."""
        if not self.is_stopped:
            self._show(self._scanner.push(self._stream.finish()))
            self._show(self._scanner.finish())

    def take(self) -> TextDelta | None:
        """What became visible since the last call; None if nothing did."""
        logprobs = []
        while self._waiting and self._waiting[0][0] < self._num_visible_chars:
            logprobs.append(self._waiting.popleft()[1])
        if not self._fresh_text and not logprobs:
            return None
        delta = TextDelta("".join(self._fresh_text), self._num_fresh_tokens, tuple(logprobs))
        self._fresh_text, self._num_fresh_tokens = [], 0
        return delta

    def _show(self, text: str) -> None:
        if text:
            self._fresh_text.append(text)
            self._num_visible_chars += len(text)

    def _token_text(self, candidate: TokenLogprob) -> TokenText:
        spelt = self._vocabulary.token_bytes(candidate.token_id)
        return TokenText(spelt.decode(errors="replace"), spelt, candidate.logprob)


def _spelling_of(decoder: Any) -> _Spelling | None:
    """Recognise a decoder of the tokenizers library by its description; None where pieces do not stand for themselves."""
    if decoder is None:
        return None
    steps = list(_steps(json.loads(decoder.__getstate__())))
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return _Spelling(is_byte_level=True)
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        dropped = "" if steps[0]["prepend_scheme"] == "never" else mark
        return _Spelling(replacements=((mark, " "),), dropped_in_first_piece=dropped)
    return _sentencepiece_spelling(steps)


def _steps(description: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if description["type"] == "Sequence":
        for step in description["decoders"]:
            yield from _steps(step)
    else:
        yield description


def _sentencepiece_spelling(steps: Sequence[dict[str, Any]]) -> _Spelling | None:
    """`Replace* ByteFallback Fuse Strip?`, as converted sentencepiece models have it."""
    replacements: list[tuple[str, str]] = []
    strip, strip_count, seen = "", 0, []
    for step in steps:
        seen.append(step["type"])
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                replacements.append((pattern, content))
            case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0}:
                strip, strip_count = content, start
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                return None
    middle = ["ByteFallback", "Fuse"]
    if seen not in (["Replace"] * len(replacements) + middle, ["Replace"] * len(replacements) + [*middle, "Strip"]):
        return None
    return _Spelling(replacements=tuple(replacements), has_byte_pieces=True, strip=strip, strip_count=strip_count)


def _piece_bytes(piece: str, spelling: _Spelling) -> bytes:
    if spelling.is_byte_level:
        if all(char in _BYTE_OF_CHAR for char in piece):
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        return piece.encode()  # an added token that is written as it is
    for pattern, content in spelling.replacements:
        piece = piece.replace(pattern, content)
    if spelling.has_byte_pieces and (match := _BYTE_PIECE.match(piece)):
        return bytes.fromhex(match[1])
    return piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
