"""Block tables and the prefix index: which KV a token sequence already has. Host only; moving bytes is written here as copy orders.

A `BlockTable` is the KV of one token sequence:

    |<-- exact_tokens: dense rows over exact context -->|<-- approximate -->|<-- reserved, not computed -->|
    0                                                             num_tokens            len(blocks) * 16

A full block that lies wholly in the exact part enters the prefix index under a hash of everything before and in it, and may
be shared by any sequence with the same salt. Approximate and partly filled blocks never enter the index. Full blocks are never
written again; a partly filled block has one holder, so cutting or forking inside a block copies it (copy-on-write).

A block that nobody holds is kept for its prefix, or free. A free block is *stale* while the bytes of its last holder lie in it: nobody
reads them, and an erasure takes them away.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import TokenId
from loopserve.kv.pool import BlockPool
from loopserve.plan import BlockCopy, BlockId

BlockHash = bytes


class Provenance(Enum):
    """How a full block's KV came about."""

    EXACT = "exact"  # dense rows over an exact context
    APPROXIMATE = "approximate"  # sparse somewhere in its past


@dataclass(slots=True)
class BlockTable:
    """The KV of one token sequence. Edited by `KVCache` only."""

    seed: BlockHash  # of the hash chain: model fingerprint and salt
    blocks: list[BlockId] = field(default_factory=list)
    num_tokens: int = 0  # computed
    exact_tokens: int = 0  # leading computed tokens that are exact
    epoch: int = 0  # changes whenever `blocks` changes other than by growing
    hashes: list[BlockHash] = field(default_factory=list)  # of the leading full exact blocks


class KVCache:
    """The one writer of block tables. Not thread-safe: it belongs to the engine thread."""

    def __init__(self, num_blocks: int, *, fingerprint: str, makes_runs: bool = True) -> None:
        """`makes_runs`: neighbouring blocks for one table, where the device reads these faster."""
        self._pool = BlockPool(num_blocks, on_reclaim=self._forget, makes_runs=makes_runs)
        self._fingerprint = fingerprint
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self._provenance: dict[BlockId, Provenance] = {}
        self._copies: list[BlockCopy] = []
        self._stale: set[BlockId] = set()  # free blocks that were written and not erased since

    @property
    def pool(self) -> BlockPool:
        """The pool, to be read."""
        return self._pool

    def provenance(self, block: BlockId) -> Provenance | None:
        """How a full block came about; None for a partly filled one."""
        return self._provenance.get(block)

    def open(self, salt: str) -> BlockTable:
        """An empty table whose prefix is shared within `salt` only."""
        return BlockTable(seed=_hash(self._fingerprint.encode(), salt.encode()))

    def match(self, token_ids: Sequence[TokenId], salt: str, *, max_tokens: int) -> BlockTable:
        """A new table holding the longest indexed prefix of `token_ids`, at most `max_tokens` of it."""
        table = self.open(salt)
        parent = table.seed
        for start in range(0, max_tokens - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            parent = _hash(parent, _token_bytes(token_ids[start : start + BLOCK_TOKENS]))
            block = self._by_hash.get(parent)
            if block is None:
                break
            self._pool.retain(block)
            table.blocks.append(block)
            table.hashes.append(parent)
        table.num_tokens = table.exact_tokens = len(table.blocks) * BLOCK_TOKENS
        return table

    def fork(self, source: BlockTable, num_tokens: int) -> BlockTable | None:
        """A new table with the first `num_tokens` of `source`: full blocks shared, a part of a block copied.

        None when no block is free for the copy.
        """
        assert num_tokens <= source.num_tokens, "only computed tokens can be forked"
        num_full, rest = divmod(num_tokens, BLOCK_TOKENS)
        tail = self._copy_of(source.blocks[num_full]) if rest else None
        if rest and tail is None:
            return None
        table = BlockTable(seed=source.seed, blocks=source.blocks[:num_full], hashes=source.hashes[:num_full])
        for block in table.blocks:
            self._pool.retain(block)
        if tail is not None:
            table.blocks.append(tail)
        table.num_tokens = num_tokens
        table.exact_tokens = min(source.exact_tokens, num_tokens)
        return table

    def truncate(self, table: BlockTable, num_tokens: int) -> bool:
        """Cut the table to its first `num_tokens`. False, with the table unchanged, when no block is free for a copy."""
        assert num_tokens <= table.num_tokens, "a table is cut, not extended, by truncate"
        num_full, rest = divmod(num_tokens, BLOCK_TOKENS)
        tail: BlockId | None = None
        if rest:
            tail = table.blocks[num_full]
            if self._pool.count(tail) > 1 or tail in self._hash_of:
                tail = self._copy_of(tail)
                if tail is None:
                    return False
            else:
                self._provenance.pop(tail, None)
                self._pool.retain(tail)  # survives the release of the old tail below
        self._release(table.blocks[num_full:])
        del table.blocks[num_full:]
        if tail is not None:
            table.blocks.append(tail)
        del table.hashes[num_full:]
        table.num_tokens = num_tokens
        table.exact_tokens = min(table.exact_tokens, num_tokens)
        table.epoch += 1
        return True

    def num_blocks_missing(self, table: BlockTable, num_tokens: int) -> int:
        """How many more blocks the table needs to hold `num_tokens`."""
        return max(0, -(-num_tokens // BLOCK_TOKENS) - len(table.blocks))

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Give the table room for `num_tokens`, or leave it as it is and return False when too few blocks are free."""
        missing = self.num_blocks_missing(table, num_tokens)
        if missing > self._pool.num_free:
            return False
        for _ in range(missing):
            block = self._allocate(table.blocks[-1] if table.blocks else None)
            assert block is not None, "num_free promised a block"
            table.blocks.append(block)
        return True

    def trim(self, table: BlockTable) -> None:
        """Give back the blocks that were reserved and hold nothing computed."""
        num_used = -(-table.num_tokens // BLOCK_TOKENS)
        if num_used < len(table.blocks):
            self._release(table.blocks[num_used:])
            del table.blocks[num_used:]
            table.epoch += 1

    def commit(self, table: BlockTable, token_ids: Sequence[TokenId], *, num_tokens: int, exact: bool) -> None:
        """Record that `token_ids[table.num_tokens:num_tokens]` are now computed; `exact`: by rows that read everything."""
        assert table.num_tokens <= num_tokens <= len(table.blocks) * BLOCK_TOKENS, "commit outside the reserved room"
        first_unfilled = table.num_tokens // BLOCK_TOKENS
        if exact and table.exact_tokens == table.num_tokens:
            table.exact_tokens = num_tokens
        table.num_tokens = num_tokens
        for index in range(first_unfilled, num_tokens // BLOCK_TOKENS):
            self._file(table, token_ids, index)

    def free(self, table: BlockTable) -> None:
        """Give back all blocks; the table is empty afterwards and may be filled again."""
        self._release(table.blocks)
        table.blocks = []
        table.hashes = []
        table.num_tokens = table.exact_tokens = 0
        table.epoch += 1

    def forget(self, token_ids: Sequence[TokenId], salt: str, *, from_tokens: int = 0) -> None:
        """Take out of the prefix index what it keeps of a sequence beyond its first `from_tokens` and what nobody holds."""
        parent = self.open(salt).seed
        for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
            parent = _hash(parent, _token_bytes(token_ids[end - BLOCK_TOKENS : end]))
            block = self._by_hash.get(parent)
            if end > from_tokens and block is not None and self._pool.count(block) == 0:
                self._pool.forget(block)
                self._stale.add(block)

    def take_stale(self) -> tuple[BlockId, ...]:
        """Every free block that still holds somebody's bytes; the caller erases them before the next forward."""
        unread = self._stale.difference(copy.source for copy in self._copies)
        self._stale -= unread
        return tuple(sorted(unread))

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """The copy orders since the last call; they must be carried out, in order, before the next forward."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def check(self) -> None:
        """Assert that pool and index agree."""
        self._pool.check()
        assert len(self._by_hash) == len(self._hash_of), "a block is indexed twice"
        assert all(self._provenance[b] is Provenance.EXACT for b in self._hash_of), "an approximate block is indexed"
        assert all(self._pool.count(b) == 0 and b not in self._hash_of for b in self._stale), "a stale block is in use"

    def _file(self, table: BlockTable, token_ids: Sequence[TokenId], index: int) -> None:
        block = table.blocks[index]
        end = (index + 1) * BLOCK_TOKENS
        if end > table.exact_tokens:
            self._provenance[block] = Provenance.APPROXIMATE
            return
        self._provenance[block] = Provenance.EXACT
        assert len(table.hashes) == index, "the hash chain has a gap"
        parent = table.hashes[-1] if table.hashes else table.seed
        digest = _hash(parent, _token_bytes(token_ids[end - BLOCK_TOKENS : end]))
        table.hashes.append(digest)
        if digest not in self._by_hash:  # another sequence may have computed the same block first
            self._by_hash[digest] = block
            self._hash_of[block] = digest
            self._pool.mark(block)

    def _copy_of(self, source: BlockId) -> BlockId | None:
        target = self._allocate(None)
        if target is not None:
            self._copies.append(BlockCopy(source=source, target=target))
        return target

    def _allocate(self, after: BlockId | None) -> BlockId | None:
        block = self._pool.allocate(after)
        if block is not None:
            self._stale.discard(block)
        return block

    def _release(self, blocks: Sequence[BlockId]) -> None:
        for block in reversed(blocks):  # the end of a chain is useless without its start: let it be reclaimed first
            if self._pool.count(block) == 1 and block not in self._hash_of:
                self._provenance.pop(block, None)
                self._stale.add(block)
            self._pool.release(block)

    def _forget(self, block: BlockId) -> None:
        del self._by_hash[self._hash_of.pop(block)]
        del self._provenance[block]


def _hash(parent: bytes, content: bytes) -> BlockHash:
    # Cryptographic on purpose: a collision would show one conversation's KV to another.
    return hashlib.blake2b(len(parent).to_bytes(4, "little") + parent + content, digest_size=16).digest()


def _token_bytes(token_ids: Sequence[TokenId]) -> bytes:
    return array("q", token_ids).tobytes()
