"""Sealed files: safetensors whose every byte is checked before it is believed. Knows nothing of sessions. Floor 2.

    | length, 8 | header: JSON, padded to 8 | tensors, in the header's order | seal, 16 |
    |<------ covered by the seal ---------->|<- by checksums in the header ->|

The header's metadata names the kind of file, its version, and says the rest as JSON (`about`). The seal is the file's last tensor, so
that any safetensors reader opens the file: it cannot lie in the header that it covers, and nothing outside a tensor may follow.

`read_head` asks for the header and the seal alone, wherever they lie. We write and read the header ourselves: the safetensors package
brings whole files, or maps them, and a mapped file that shrinks on a shared file system kills the process.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

# Keyed, and as good at 16 bytes as anything: 0.7 GB/s on a core of a Xeon, in pieces of 32 KiB. SHA-256 had 1.3 there, by instructions that
# not every machine has, and no key; CRC-32 had 3.7, and two blocks of one checksum are quickly found.
DIGEST_BYTES = 16

_HEAD_BYTES_MAX = 100_000_000  # as safetensors has it
_SEAL = "seal"
_Record = TypeVar("_Record")
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class Refusal(StrEnum):
    """Why something that was stored or sent is not taken."""

    TRUNCATED = "truncated"  # a part of it is missing
    CORRUPT = "corrupt"  # a checksum differs, or what it says contradicts itself
    FOREIGN = "foreign"  # another model, shape, dtype or block size, or nothing of ours
    VERSION = "version"  # of ours, but of another version


class ImageRefused(Exception):  # a verdict that every reader must answer, by computing the session again
    """What was read is not what was written, or not meant for this model. `reason` is for counting, the message for the log."""

    def __init__(self, reason: Refusal, message: str, /) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a sealed file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SealedHead:
    """What a sealed file says of itself: `about` as JSON, and where each part begins, in bytes from the file's start."""

    about: str
    parts: tuple[Part, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Kind:
    format: str
    version: str
    about: str


_KIND = TypeAdapter(_Kind)
_SPANS = TypeAdapter(dict[str, _Span])


def digest(data: bytes | memoryview, *, key: bytes = b"") -> bytes:
    """The checksum of some bytes, 16 bytes; under another key it is another one."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=key).digest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy, as a flat view."""
    assert tensor.is_contiguous(), "only a contiguous tensor is one run of bytes"
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def make_head(kind: str, version: int, about: str, parts: Sequence[Part]) -> bytes:
    """Length and header of a file with these parts; its parts' bytes and `make_seal` of this follow."""
    header: dict[str, Any] = {"__metadata__": {"format": kind, "version": str(version), "about": about}}
    end = 0
    for part in (*parts, Part(_SEAL, torch.uint8, (DIGEST_BYTES,))):
        start, end = end, end + part.num_bytes
        header[part.name] = {"dtype": _DTYPE_NAMES[part.dtype], "shape": part.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    assert len(text) <= _HEAD_BYTES_MAX, "the header is longer than safetensors may have it"
    return len(text).to_bytes(8, "little") + text


def make_seal(head: bytes) -> bytes:
    """What ends a file that begins with this."""
    return digest(head)


def read_head(kind: str, version: int, size: int, read: Callable[[int, int], bytes | memoryview]) -> SealedHead:
    """The head of a sealed file of `size` bytes, of which `read(offset, length)` brings some.

    Raises ImageRefused, and what `read` raises.
    """
    if size < 8:
        raise ImageRefused(Refusal.TRUNCATED, f"{size} bytes are no file of ours")
    length = int.from_bytes(read(0, 8), "little")
    if length > _HEAD_BYTES_MAX:
        raise ImageRefused(Refusal.FOREIGN, f"a header of {length} bytes is longer than safetensors has it")
    if 8 + length > size:
        raise ImageRefused(Refusal.TRUNCATED, f"the header ends at byte {8 + length}, the file at {size}")
    head = bytes(read(0, 8 + length))
    named, spans = _read_header(head[8:])
    if named.format != kind:
        raise ImageRefused(Refusal.FOREIGN, f"it is a {named.format!r}, not a {kind!r}")
    if named.version != str(version):
        raise ImageRefused(Refusal.VERSION, f"it is of version {named.version!r}, this is {version}")
    end = 8 + length + max((span.data_offsets[1] for span in spans.values()), default=0)
    if end > size:
        raise ImageRefused(Refusal.TRUNCATED, f"the file should have {end} bytes, but has {size}")
    if end < size or end < 8 + length + DIGEST_BYTES or bytes(read(size - DIGEST_BYTES, DIGEST_BYTES)) != digest(head):
        raise ImageRefused(Refusal.CORRUPT, "the seal does not fit the header")
    return _laid_out(named.about, spans, first_byte=8 + length)


def checked_line(text: str) -> bytes:
    """A line of text behind its checksum. The text is ASCII without line breaks, as `json.dumps` makes it."""
    line = text.encode("ascii")
    assert b"\n" not in line, "a line has no breaks"
    return digest(line).hex().encode() + b" " + line + b"\n"


def text_of(line: bytes) -> str:
    """The text of a checked line, its break left out or not. Raises ImageRefused."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if checksum != digest(text).hex().encode():
        raise ImageRefused(Refusal.CORRUPT, "a checksum does not fit its line")
    return text.decode("ascii", "replace")


def parsed(adapter: TypeAdapter[_Record], text: str | bytes) -> _Record:
    """JSON as a record. Raises ImageRefused where it is malformed."""
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        raise ImageRefused(Refusal.CORRUPT, f"it is malformed: {error.errors()[0]['msg']}") from None


def escaped(name: str) -> str:
    """Any string as ASCII text, lone surrogates included, which JSON readers refuse elsewhere."""
    return json.dumps(name)[1:-1]


def unescaped(text: str) -> str:
    """What was escaped. Raises ImageRefused."""
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        raise ImageRefused(Refusal.CORRUPT, "a name is malformed") from None


def _read_header(text: bytes) -> tuple[_Kind, dict[str, _Span]]:
    try:
        header = json.loads(text.decode("ascii"))
        metadata = header.pop("__metadata__")
        return _KIND.validate_json(json.dumps(metadata)), _SPANS.validate_json(json.dumps(header))
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        # Whether it was once one of ours is guessed, for the log: nothing of it is believed.
        reason = Refusal.CORRUPT if b"loopserve" in text else Refusal.FOREIGN
        raise ImageRefused(reason, "the header is not one of ours") from None


def _laid_out(about: str, spans: dict[str, _Span], *, first_byte: int) -> SealedHead:
    """The parts one after the other, as `make_head` lays them out; anything else is malformed, however well it is sealed."""
    parts: list[Part] = []
    starts: list[int] = []
    end = 0
    for name, span in spans.items():
        dtype = _DTYPES.get(span.dtype)
        if dtype is None or any(extent < 0 for extent in span.shape):
            raise ImageRefused(Refusal.FOREIGN, f"{name!r} is {span.dtype} {list(span.shape)}")
        num_elements = 1
        for extent in span.shape:
            num_elements *= extent
        if span.data_offsets != (end, end + num_elements * dtype.itemsize):
            raise ImageRefused(Refusal.CORRUPT, f"{name!r} lies at {span.data_offsets}, behind byte {end}")
        parts.append(Part(name, dtype, span.shape))
        starts.append(first_byte + end)
        end = span.data_offsets[1]
    if not parts or parts[-1] != Part(_SEAL, torch.uint8, (DIGEST_BYTES,)):
        raise ImageRefused(Refusal.CORRUPT, "the seal is not its last part")
    return SealedHead(about, tuple(parts[:-1]), tuple(starts[:-1]))
