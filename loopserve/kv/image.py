"""The session image: token histories and KV of one session, as it is handed to another replica and kept on disk. Floor 2.

Owns the record, the bytes of it, and what a block's content is called (`BlockNamer`). Knows no engine and no device: all is on the CPU.

An encoded image is one sealed safetensors file (`sealed`):

    keys, values    [L, B, T, Hkv, D]   L layers, B blocks, T tokens a block; each block once, however many branches hold it
    token_ids       int32 [N]           the histories of all branches, one behind the other
    about           KVFormat, session, branches, a checksum for each block and one for the token ids

A slot behind the last computed token of a block holds whatever lay there before: another session's, maybe. It is written as zeros.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from pydantic import TypeAdapter
from torch import Tensor

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import SessionId, TokenId
from loopserve.kv.sealed import (
    ImageRefused,
    Part,
    Refusal,
    SealedHead,
    digest,
    escaped,
    make_head,
    make_seal,
    parsed,
    raw,
    read_head,
    unescaped,
)

__all__ = ["BlockNamer", "BranchImage", "ImageRefused", "KVFormat", "Refusal", "SessionImage", "decode", "encode"]

VERSION = 1
_KIND = "loopserve.session_image"
_TOKEN_ID_MAX = 2**31 - 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What both sides of a hand-off must agree on, and what one directory's files have in common."""

    fingerprint: str  # of the model
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # float32, bfloat16 or float16
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        assert self.dtype in _DTYPES, f"KV of {self.dtype} has no image"
        assert min(self.num_layers, self.num_kv_heads, self.head_dim, self.block_tokens) >= 1, (
            "KV has no empty dimension"
        )

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """One block as it is named and stored: keys and values, L, T, Hkv, D."""
        return (2, self.num_layers, self.block_tokens, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values of all layers."""
        return torch.Size(self.block_shape).numel() * self.dtype.itemsize

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int]:
        """Keys or values of some blocks in an image: [L, B, T, Hkv, D]."""
        return (self.num_layers, num_blocks, self.block_tokens, self.num_kv_heads, self.head_dim)

    def as_text(self) -> str:
        """The same text for the same format, in JSON."""
        fields = asdict(self) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": escaped(self.fingerprint),
        }
        return json.dumps(fields, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class BranchImage:
    """One continuation of a session. `token_ids[:num_tokens]` is what its blocks hold; the history may be longer."""

    token_ids: tuple[TokenId, ...]
    num_tokens: int  # computed
    exact_tokens: int  # leading computed tokens that are exact
    sparse_from: int | None  # where the last answer's sparsely decoded tokens begin
    blocks: tuple[int, ...]  # of the image, ceil(num_tokens / T) of them


@dataclass(frozen=True, slots=True, eq=False)
class SessionImage:
    """One session. Keys and values are CPU tensors [L, B, T, Hkv, D] of the format's dtype; every block is some branch's."""

    session_id: SessionId
    salt: str
    num_turns: int
    branches: tuple[BranchImage, ...]
    keys: Tensor
    values: Tensor

    @property
    def num_blocks(self) -> int:
        """Blocks, each counted once."""
        return self.keys.shape[1]

    @property
    def num_tokens(self) -> int:
        """Computed tokens of its longest branch."""
        return max((branch.num_tokens for branch in self.branches), default=0)


class BlockNamer:
    """Names blocks of one tenant by their content: equal within a salt, unlike and unpredictable across salts and formats."""

    def __init__(self, fmt: KVFormat, salt: str) -> None:
        self._key = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), key=_digest_of(fmt), digest_size=32).digest()

    def name(self, block: Tensor) -> bytes:
        """16 bytes for a block [2, L, T, Hkv, D], contiguous."""
        return digest(raw(block), key=self._key)


def format_digest(fmt: KVFormat) -> str:
    """32 hexadecimal digits that differ where formats or the versions of what is written differ."""
    return _digest_of(fmt).hex()


def filled_tokens(branches: Sequence[BranchImage], num_blocks: int, block_tokens: int) -> list[int]:
    """How many leading tokens of each block are computed: for whichever branch holds most of it."""
    filled = [0] * num_blocks
    for branch in branches:
        for place, block in enumerate(branch.blocks):
            filled[block] = max(filled[block], min(block_tokens, branch.num_tokens - place * block_tokens))
    return filled


def gather_block(image: SessionImage, block: int, num_filled: int, out: Tensor) -> None:
    """Write one block into `out` [2, L, T, Hkv, D], zeros behind its first `num_filled` tokens."""
    out[0].copy_(image.keys[:, block])
    out[1].copy_(image.values[:, block])
    out[:, :, num_filled:] = 0


def image_fault(image: SessionImage, fmt: KVFormat) -> str | None:
    """What is wrong with an image, one sentence; None for a good one. Linear in tokens and blocks."""
    for pool in (image.keys, image.values):
        if (
            tuple(pool.shape) != fmt.pool_shape(image.num_blocks)
            or pool.dtype != fmt.dtype
            or pool.device.type != "cpu"
        ):
            return f"keys or values are {pool.dtype} {list(pool.shape)} on {pool.device}"
    if image.num_turns < 0:
        return "the number of turns is negative"
    held: set[int] = set()
    for branch in image.branches:
        if not 0 <= branch.exact_tokens <= branch.num_tokens <= len(branch.token_ids):
            return "a branch has more exact tokens than computed ones, or more of these than its history"
        if branch.sparse_from is not None and not 0 <= branch.sparse_from <= len(branch.token_ids):
            return "a branch is sparse from outside its history"
        if len(branch.blocks) != -(-branch.num_tokens // fmt.block_tokens):
            return "a branch has more or fewer blocks than its tokens need"
        if branch.token_ids and not 0 <= min(branch.token_ids) <= max(branch.token_ids) <= _TOKEN_ID_MAX:
            return "a token id is negative or needs more than 31 bits"
        held.update(branch.blocks)
    if held != set(range(image.num_blocks)):
        return "a branch holds a block that is not there, or a block is held by none"
    return None


@dataclass(frozen=True, slots=True)
class _BranchAbout:
    history_len: int
    num_tokens: int
    exact_tokens: int
    sparse_from: int | None
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _About:
    kv_format: str
    session_id: str
    salt: str
    num_turns: int
    branches: tuple[_BranchAbout, ...]
    token_ids_checksum: str
    block_checksums: tuple[str, ...]


_ABOUT = TypeAdapter(_About)


def encode(image: SessionImage, fmt: KVFormat) -> bytes:
    """One safetensors file, written into memory once. The image must be good (`image_fault`) and is not changed."""
    fault = image_fault(image, fmt)
    assert fault is None, fault
    filled = filled_tokens(image.branches, image.num_blocks, fmt.block_tokens)
    ids = torch.tensor([token for branch in image.branches for token in branch.token_ids], dtype=torch.int32)
    about = _About(
        kv_format=fmt.as_text(),
        session_id=escaped(image.session_id),
        salt=escaped(image.salt),
        num_turns=image.num_turns,
        branches=tuple(
            _BranchAbout(len(b.token_ids), b.num_tokens, b.exact_tokens, b.sparse_from, b.blocks)
            for b in image.branches
        ),
        token_ids_checksum=digest(raw(ids)).hex(),
        block_checksums=tuple(_checksums(image, fmt, filled)),
    )
    head = make_head(_KIND, VERSION, _ABOUT.dump_json(about).decode("ascii"), _parts(fmt, image.num_blocks, len(ids)))
    pools = [piece for pool in (image.keys, image.values) for piece in _pieces(pool, filled, fmt)]
    return b"".join([head, *pools, raw(ids), make_seal(head)])


def decode(data: bytes | bytearray | memoryview, fmt: KVFormat) -> SessionImage:
    """The image that was encoded. Raises ImageRefused, and nothing else, whatever `data` is.

    Tensors lie in `data` itself where that can be written to (a bytearray), and then change with it; else they are copied once.
    """
    view = memoryview(data).cast("B")
    head = read_head(_KIND, VERSION, len(view), lambda offset, length: view[offset : offset + length])
    about = parsed(_ABOUT, head.about)
    if about.kv_format != fmt.as_text():
        raise ImageRefused(Refusal.FOREIGN, f"its KV is {about.kv_format}, ours is {fmt.as_text()}")
    keys, values, ids = _tensors(view, head, fmt, num_blocks=len(about.block_checksums))
    if digest(raw(ids)).hex() != about.token_ids_checksum:
        raise ImageRefused(Refusal.CORRUPT, "a checksum does not fit the token ids")
    image = SessionImage(
        session_id=SessionId(unescaped(about.session_id)),
        salt=unescaped(about.salt),
        num_turns=about.num_turns,
        branches=_branches(about.branches, ids.tolist()),
        keys=keys,
        values=values,
    )
    fault = image_fault(image, fmt)
    if fault is not None:
        raise ImageRefused(Refusal.CORRUPT, fault)
    everything = [fmt.block_tokens] * image.num_blocks
    for block, checksum in enumerate(_checksums(image, fmt, everything)):
        if checksum != about.block_checksums[block]:
            raise ImageRefused(Refusal.CORRUPT, f"a checksum does not fit block {block}")
    return image


def _digest_of(fmt: KVFormat) -> bytes:
    return digest(f"{VERSION} {fmt.as_text()}".encode("ascii"))


def _parts(fmt: KVFormat, num_blocks: int, num_token_ids: int) -> tuple[Part, ...]:
    pools = [Part(name, fmt.dtype, fmt.pool_shape(num_blocks)) for name in ("keys", "values")]
    return (*pools, Part("token_ids", torch.int32, (num_token_ids,)))


def _checksums(image: SessionImage, fmt: KVFormat, filled: Sequence[int]) -> Iterator[str]:
    namer, block = BlockNamer(fmt, image.salt), torch.empty(fmt.block_shape, dtype=fmt.dtype)
    for index, num_filled in enumerate(filled):
        gather_block(image, index, num_filled, block)
        yield namer.name(block).hex()


def _pieces(pool: Tensor, filled: Sequence[int], fmt: KVFormat) -> Iterator[memoryview]:
    """The bytes of keys or values [L, B, T, Hkv, D], but for zeros where nothing is computed; full blocks are not copied."""
    partial = [block for block, num_filled in enumerate(filled) if num_filled < fmt.block_tokens]
    for layer in pool:  # [B, T, Hkv, D]
        start = 0
        for block in partial:
            tail = layer[block].clone()
            tail[filled[block] :] = 0
            yield raw(layer[start:block].contiguous())
            yield raw(tail)
            start = block + 1
        yield raw(layer[start:].contiguous())


def _tensors(view: memoryview, head: SealedHead, fmt: KVFormat, *, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    num_ids = head.parts[-1].shape[0] if head.parts and len(head.parts[-1].shape) == 1 else 0
    if head.parts != _parts(fmt, num_blocks, num_ids):
        raise ImageRefused(Refusal.CORRUPT, "its tensors are not those of an image of its format")
    keys, values, ids = (
        _tensor(view[start : start + part.num_bytes], part) for part, start in zip(head.parts, head.starts, strict=True)
    )
    return keys, values, ids


def _tensor(data: memoryview, part: Part) -> Tensor:
    if part.num_bytes == 0:
        return torch.empty(part.shape, dtype=part.dtype)
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=part.dtype).view(part.shape)


def _branches(abouts: Sequence[_BranchAbout], ids: Sequence[TokenId]) -> tuple[BranchImage, ...]:
    if any(about.history_len < 0 for about in abouts) or sum(about.history_len for about in abouts) != len(ids):
        raise ImageRefused(Refusal.CORRUPT, "there are more or fewer token ids than its branches have")
    branches: list[BranchImage] = []
    start = 0
    for about in abouts:
        history = tuple(ids[start : start + about.history_len])
        branches.append(BranchImage(history, about.num_tokens, about.exact_tokens, about.sparse_from, about.blocks))
        start += about.history_len
    return tuple(branches)
