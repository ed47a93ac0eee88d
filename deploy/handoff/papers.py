"""What goes beside a session's image: its conversation and its transcripts, as bytes that are believed only after they were checked.

    magic, 4 | version, 2 | digest of all that follows, 16 | length of the header, 4 | header: JSON | token ids, 4 bytes each

Written and read by replicas of one application, maybe of two releases: another version is refused. All numbers are little-endian. Pure.
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.conversations import KEYS_PER_CONVERSATION, ConversationRecord
from loopserve.dialogue import SessionId
from loopserve.transcripts import TRANSCRIPTS_PER_SESSION, Mark, Transcript

VERSION = 1
PAPERS_BYTES_MAX = 16 << 20  # nearly four million token ids; older transcripts are left out beyond it
_HEADER_BYTES_MAX = 4 << 20  # marks of a session with thousands of turns, in eight transcripts

_MAGIC = b"LSHP"
_HEAD = struct.Struct("<4sH16sI")
_ID_BYTES = 4


class PapersRefused(Exception):
    """What came is not what was written, or is of another version. `code` is for counting."""

    def __init__(self, code: str, message: str, /) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Papers:
    """What a replica and its chat service know of one session."""

    session_id: SessionId
    conversation: ConversationRecord
    transcripts: tuple[Transcript, ...]


_Count = Annotated[int, Field(ge=0, lt=1 << 40)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _ConversationText(_Strict):
    name: str
    claim: str
    home: str
    last_used_s: float
    continuations: Annotated[tuple[tuple[str, str], ...], Field(max_length=KEYS_PER_CONVERSATION)]


class _TranscriptText(_Strict):
    num_tokens: _Count
    marks: tuple[tuple[_Count, _Count, Annotated[str, Field(pattern=r"^[0-9a-f]*$")]], ...]


class _Header(_Strict):
    session_id: str
    conversation: _ConversationText
    transcripts: Annotated[tuple[_TranscriptText, ...], Field(max_length=TRANSCRIPTS_PER_SESSION)]


def encode_papers(papers: Papers) -> bytes:
    """The papers as bytes, at most `PAPERS_BYTES_MAX`: the newest transcripts that have room."""
    transcripts = papers.transcripts
    while True:
        data = _encoded(papers, transcripts)
        if data is not None or not transcripts:
            break
        transcripts = transcripts[:-1]
    assert data is not None, "a conversation without transcripts has a few kilobytes"
    return data


def decode_papers(data: bytes) -> Papers:
    """The papers that were encoded. Raises PapersRefused, and nothing else, whatever `data` is."""
    header, numbers = _opened(data)
    counts = [transcript.num_tokens for transcript in header.transcripts]
    if sum(counts) * _ID_BYTES != len(numbers):
        raise PapersRefused("corrupt", f"{sum(counts)} token ids are announced, {len(numbers)} bytes are there")
    token_ids = _array(numbers)
    transcripts = []
    for told, (start, end) in zip(header.transcripts, pairwise((0, *accumulate(counts))), strict=True):
        marks = tuple(Mark(chars, tokens, _digest_bytes(digest)) for chars, tokens, digest in told.marks)
        transcript = Transcript(token_ids[start:end], marks)
        fault = transcript.fault()
        if fault is not None:
            raise PapersRefused("corrupt", f"a transcript cannot be: {fault}")
        transcripts.append(transcript)
    conversation = header.conversation
    return Papers(
        SessionId(header.session_id),
        ConversationRecord(
            conversation.name,
            conversation.claim,
            conversation.home,
            conversation.last_used_s,
            conversation.continuations,
        ),
        tuple(transcripts),
    )


def _encoded(papers: Papers, transcripts: Sequence[Transcript]) -> bytes | None:
    """None where that is too much."""
    if sum(len(transcript.token_ids) for transcript in transcripts) * _ID_BYTES > PAPERS_BYTES_MAX:
        return None
    told = papers.conversation
    header = _Header(
        session_id=papers.session_id,
        conversation=_ConversationText(
            name=told.name,
            claim=told.claim,
            home=told.home,
            last_used_s=told.last_used_s,
            continuations=told.continuations,
        ),
        transcripts=tuple(
            _TranscriptText(
                num_tokens=len(transcript.token_ids),
                marks=tuple((mark.num_chars, mark.num_tokens, mark.digest.hex()) for mark in transcript.marks),
            )
            for transcript in transcripts
        ),
    )
    text = header.model_dump_json().encode()
    rest = b"".join((text, *(_bytes(transcript.token_ids) for transcript in transcripts)))
    data = _HEAD.pack(_MAGIC, VERSION, _digest(len(text), rest), len(text)) + rest
    return data if len(data) <= PAPERS_BYTES_MAX and len(text) <= _HEADER_BYTES_MAX else None


def _opened(data: bytes) -> tuple[_Header, memoryview]:
    """The header and the bytes of the token ids."""
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise PapersRefused("foreign", "these are no papers of a session")
    _, version, digest, header_len = _HEAD.unpack_from(data)
    if version != VERSION:
        raise PapersRefused("version", f"they are of version {version}, this replica reads {VERSION}")
    rest = memoryview(data)[_HEAD.size :]
    if digest != _digest(header_len, rest):
        raise PapersRefused("corrupt", "the checksum does not fit")
    if header_len > min(len(rest), _HEADER_BYTES_MAX):
        raise PapersRefused("corrupt", f"a header of {header_len} bytes is announced, {len(rest)} are there")
    try:
        return _Header.model_validate_json(bytes(rest[:header_len])), rest[header_len:]
    except ValidationError as error:
        raise PapersRefused("corrupt", f"the header cannot be read: {error.errors()[0]['msg']}") from None


def _digest(header_len: int, rest: bytes | memoryview) -> bytes:
    hasher = blake2b(header_len.to_bytes(4, "little"), digest_size=16)
    hasher.update(rest)
    return hasher.digest()


def _digest_bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise PapersRefused("corrupt", "a mark's digest is not hexadecimal") from None


def _bytes(token_ids: "array[int]") -> bytes:
    if sys.byteorder == "big":
        token_ids = token_ids[:]
        token_ids.byteswap()
    return token_ids.tobytes()


def _array(data: memoryview) -> "array[int]":
    token_ids = array("I", bytes(data))
    assert token_ids.itemsize == _ID_BYTES
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids
