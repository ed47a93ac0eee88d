"""Block tables and the prefix index: which KV a token sequence already has, and on which tier. Host only; moving bytes is written here as
copy orders.

A `BlockTable` is the KV of one token sequence:

    |<-- exact_tokens: dense rows over exact context -->|<-- approximate -->|<-- reserved, not computed -->|
    0                                                             num_tokens            len(blocks) * 16

A full block that lies wholly in the exact part enters the prefix index under a hash of everything before and in it, and may
be shared by any sequence with the same salt. Approximate and partly filled blocks never enter the index. Full blocks are never
written again; a partly filled block has one holder, so cutting or forking inside a block copies it (copy-on-write).

Each block of a table lies on the device or in host memory (`loopserve.plan.BlockId` numbers both); only device blocks are written. Moving a
block gives its table the block's copy on the other tier. Whoever else holds it keeps the one that it has, and moves to the same copy: a
block that is shared lies at most once on each tier.

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
from loopserve.plan import NULL_BLOCK, BlockCopy, BlockId

BlockHash = bytes


class Tier(Enum):
    """Where a block's bytes lie."""

    DEVICE = "device"
    HOST = "host"


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
    num_host_blocks: int = 0  # of `blocks`, those in host memory

    @property
    def num_device_blocks(self) -> int:
        """Blocks on the device."""
        return len(self.blocks) - self.num_host_blocks


@dataclass(slots=True)
class _Shelf:
    """One tier: its blocks, and what the prefix index knows to lie in them."""

    pool: BlockPool
    by_hash: dict[BlockHash, BlockId] = field(default_factory=dict)


class KVCache:
    """The one writer of block tables. Not thread-safe: it belongs to the engine thread."""

    def __init__(self, num_blocks: int, *, num_host_blocks: int = 0, fingerprint: str, makes_runs: bool = True) -> None:
        """Device blocks, the null block included, and host blocks. `makes_runs`: neighbouring device blocks for one table, where the
        device reads these faster."""
        assert num_blocks >= 2, "the device needs the null block and at least one more"
        device, host = range(NULL_BLOCK + 1, num_blocks), range(num_blocks, num_blocks + num_host_blocks)
        self._device = _Shelf(BlockPool(device, on_reclaim=self._forget, makes_runs=makes_runs))
        self._host = _Shelf(BlockPool(host, on_reclaim=self._forget))
        self._fingerprint = fingerprint
        self._hash_of: dict[BlockId, BlockHash] = {}
        self._provenance: dict[BlockId, Provenance] = {}
        self._twins: dict[BlockId, BlockId] = {}  # full blocks that have the same content on the other tier, both ways
        self._copies: list[BlockCopy] = []
        self.num_reclaimed = 0  # blocks kept for their prefix that were handed out all the same
        self._stale: set[BlockId] = set()  # free blocks that were written and not erased since

    @property
    def pool(self) -> BlockPool:
        """The device's pool, to be read."""
        return self._device.pool

    @property
    def host_pool(self) -> BlockPool:
        """The host's pool, to be read; empty where there is no such tier."""
        return self._host.pool

    @property
    def has_host(self) -> bool:
        """Whether there is a host tier."""
        return self._host.pool.num_usable > 0

    def tier_of(self, block: BlockId) -> Tier:
        """Where a block lies."""
        return Tier.HOST if block in self._host.pool.ids else Tier.DEVICE

    def count(self, block: BlockId) -> int:
        """How many holders a block has."""
        return self._shelf(block).pool.count(block)

    def provenance(self, block: BlockId) -> Provenance | None:
        """How a full block came about; None for a partly filled one."""
        return self._provenance.get(block)

    def open(self, salt: str) -> BlockTable:
        """An empty table whose prefix is shared within `salt` only."""
        return BlockTable(seed=_hash(self._fingerprint.encode(), salt.encode()))

    def match(self, token_ids: Sequence[TokenId], salt: str, *, max_tokens: int) -> BlockTable:
        """A new table holding the longest indexed prefix of `token_ids`, at most `max_tokens` of it, on whichever tier it lies."""
        table = self.open(salt)
        parent = table.seed
        for start in range(0, max_tokens - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            parent = _hash(parent, _token_bytes(token_ids[start : start + BLOCK_TOKENS]))
            block = self._device.by_hash.get(parent, self._host.by_hash.get(parent))
            if block is None:
                break
            self._shelf(block).pool.retain(block)
            table.blocks.append(block)
            table.hashes.append(parent)
            table.num_host_blocks += block in self._host.pool.ids
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
            self._shelf(block).pool.retain(block)
        if tail is not None:
            table.blocks.append(tail)
        table.num_tokens = num_tokens
        table.exact_tokens = min(source.exact_tokens, num_tokens)
        table.num_host_blocks = self._num_host(table.blocks)
        return table

    def truncate(self, table: BlockTable, num_tokens: int) -> bool:
        """Cut the table to its first `num_tokens`. False, with the table unchanged, when no block is free for a copy."""
        assert num_tokens <= table.num_tokens, "a table is cut, not extended, by truncate"
        num_full, rest = divmod(num_tokens, BLOCK_TOKENS)
        tail: BlockId | None = None
        if rest:
            tail = table.blocks[num_full]
            is_own = self.count(tail) == 1 and tail not in self._hash_of
            if is_own and self.tier_of(tail) is Tier.DEVICE:
                self._provenance.pop(tail, None)
                self._part(tail)
                self._device.pool.retain(tail)  # survives the release of the old tail below
            else:
                tail = self._copy_of(tail)
                if tail is None:
                    return False
        self._release(table.blocks[num_full:])
        del table.blocks[num_full:]
        if tail is not None:
            table.blocks.append(tail)
        del table.hashes[num_full:]
        table.num_tokens = num_tokens
        table.exact_tokens = min(table.exact_tokens, num_tokens)
        table.num_host_blocks = self._num_host(table.blocks)
        table.epoch += 1
        return True

    def adopt(
        self,
        token_ids: Sequence[TokenId],
        salt: str,
        *,
        num_tokens: int,
        exact_tokens: int,
        blocks: Sequence[int],
        known: dict[int, BlockId],
    ) -> BlockTable | None:
        """A table for KV that was computed elsewhere; `blocks` is what each of its blocks is called there.

        A full exact block that the index knows is shared. Others get a block, in host memory as long as there is room, and enter `known`:
        the caller fills these. One that is in `known` already, of another table of the same origin, is shared. None when no tier has room.
        """
        table = self.open(salt)
        parent = table.seed
        for place, name in enumerate(blocks):
            end = (place + 1) * BLOCK_TOKENS
            digest = None
            if end <= exact_tokens:
                digest = parent = _hash(parent, _token_bytes(token_ids[end - BLOCK_TOKENS : end]))
            block = self._adopted(digest, known.get(name), table.blocks[-1] if table.blocks else None)
            if block is None:
                self.free(table)
                return None
            is_indexed = digest is not None and self._hash_of.get(block) == digest
            if not is_indexed and name not in known:
                known[name] = block
                if end <= num_tokens:
                    self._provenance[block] = Provenance.APPROXIMATE if digest is None else Provenance.EXACT
                if digest is not None:
                    self._index(self._shelf(block), digest, block)
            table.blocks.append(block)
            if digest is not None:
                table.hashes.append(digest)
        table.num_tokens, table.exact_tokens = num_tokens, exact_tokens
        table.num_host_blocks = self._num_host(table.blocks)
        return table

    def num_blocks_missing(self, table: BlockTable, num_tokens: int) -> int:
        """How many more blocks the table needs to hold `num_tokens`."""
        return max(0, -(-num_tokens // BLOCK_TOKENS) - len(table.blocks))

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Give the table room for `num_tokens`, or leave it as it is and return False when too few blocks are free."""
        return self.extend(table.blocks, self.num_blocks_missing(table, num_tokens))

    def extend(self, blocks: list[BlockId], num_more: int) -> bool:
        """Append device blocks, each with one holder and unspecified content; False, and nothing is done, when too few are free."""
        if num_more > self._device.pool.num_free:
            return False
        for _ in range(num_more):
            block = self._allocate(self._device, blocks[-1] if blocks else None)
            assert block is not None, "num_free promised a block"
            blocks.append(block)
        return True

    def shorten(self, blocks: list[BlockId], num_blocks: int) -> None:
        """Give back all but the first `num_blocks` of what `extend` gave and no table holds."""
        self._release(blocks[num_blocks:])
        del blocks[num_blocks:]

    def offload(self, table: BlockTable, *, keep_blocks: int = 0) -> bool:
        """Move the table's blocks to host memory, but for the last `keep_blocks`; False when the host had no room for some of them."""
        most = max(0, len(table.blocks) - keep_blocks)
        return self._move(table, range(most), self._device, self._host)

    def recall(self, table: BlockTable, *, from_block: int = 0) -> bool:
        """Move the table's blocks from the given one on to the device; False when it had no room for some of them."""
        return self._move(table, range(from_block, len(table.blocks)), self._host, self._device)

    def trim(self, table: BlockTable) -> None:
        """Give back the blocks that were reserved and hold nothing computed."""
        num_used = -(-table.num_tokens // BLOCK_TOKENS)
        if num_used < len(table.blocks):
            self._release(table.blocks[num_used:])
            del table.blocks[num_used:]
            table.num_host_blocks = self._num_host(table.blocks)
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
        table.num_tokens = table.exact_tokens = table.num_host_blocks = 0
        table.epoch += 1

    def forget(self, token_ids: Sequence[TokenId], salt: str, *, from_tokens: int = 0) -> None:
        """Take out of the prefix index what it keeps of a sequence beyond its first `from_tokens` and what nobody holds."""
        parent = self.open(salt).seed
        for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
            parent = _hash(parent, _token_bytes(token_ids[end - BLOCK_TOKENS : end]))
            for shelf in (self._device, self._host) if end > from_tokens else ():
                block = shelf.by_hash.get(parent)
                if block is not None and shelf.pool.count(block) == 0:
                    shelf.pool.forget(block)
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
        """Assert that pools and index agree."""
        indexed = 0
        for shelf in (self._device, self._host):
            shelf.pool.check()
            indexed += len(shelf.by_hash)
            assert all(self._hash_of[block] == digest for digest, block in shelf.by_hash.items()), "the index is wrong"
            assert all(block in shelf.pool.ids for block in shelf.by_hash.values()), "a tier knows another's block"
        assert indexed == len(self._hash_of), "a block is indexed twice"
        assert all(self._provenance[b] is Provenance.EXACT for b in self._hash_of), "an approximate block is indexed"
        assert all(self.count(b) == 0 and b not in self._hash_of for b in self._stale), "a stale block is in use"
        for block, twin in self._twins.items():
            assert self._twins[twin] == block and self.tier_of(block) is not self.tier_of(twin), "a twin is wrong"
            assert self._provenance[block] is self._provenance[twin], "twins differ"

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
        self._index(self._device, digest, block)

    def _index(self, shelf: _Shelf, digest: BlockHash, block: BlockId) -> None:
        if digest not in shelf.by_hash:  # another sequence may have computed the same block first
            shelf.by_hash[digest] = block
            self._hash_of[block] = digest
            shelf.pool.mark(block)

    def _shelf(self, block: BlockId) -> _Shelf:
        return self._host if block in self._host.pool.ids else self._device

    def _num_host(self, blocks: Sequence[BlockId]) -> int:
        first = self._host.pool.ids.start
        return sum(1 for block in blocks if block >= first)

    def _move(self, table: BlockTable, places: range, source: _Shelf, target: _Shelf) -> bool:
        """Give the table the copies on another tier of what it holds on one; those that are not there yet are ordered."""
        is_complete, is_changed = True, False
        for place in places:
            block = table.blocks[place]
            if block not in source.pool.ids:
                continue
            before = table.blocks[place - 1] if place > 0 else None
            copy = self._moved(table, place, before if before in target.pool.ids else None, target)
            if copy is None:
                is_complete = False
                break
            table.blocks[place] = copy
            self._release([block])
            is_changed = True
        if is_changed:
            table.num_host_blocks = self._num_host(table.blocks)
            table.epoch += 1
        return is_complete

    def _adopted(self, digest: BlockHash | None, known: BlockId | None, before: BlockId | None) -> BlockId | None:
        """A block for content that comes from elsewhere: one that has it, or one to be filled."""
        there = known
        if digest is not None:
            there = self._device.by_hash.get(digest, self._host.by_hash.get(digest, known))
        if there is not None:
            self._shelf(there).pool.retain(there)
            return there
        for shelf in (self._host, self._device):
            block = self._allocate(shelf, before if before is not None and before in shelf.pool.ids else None)
            if block is not None:
                return block
        return None

    def _moved(self, table: BlockTable, place: int, before: BlockId | None, target: _Shelf) -> BlockId | None:
        """The copy of one block on another tier, held once more; None when there is no room for it."""
        block = table.blocks[place]
        digest = table.hashes[place] if place < len(table.hashes) else None
        there = self._twins.get(block, None if digest is None else target.by_hash.get(digest))
        if there is not None:
            target.pool.retain(there)
            return there
        copy = self._allocate(target, before)
        if copy is None:
            return None
        self._copies.append(BlockCopy(source=block, target=copy))
        provenance = self._provenance.get(block)
        if provenance is not None:  # full: it is never written again
            self._provenance[copy] = provenance
            self._part(block)
            self._twins[block], self._twins[copy] = copy, block
            if digest is not None:
                self._index(target, digest, copy)
        return copy

    def _copy_of(self, source: BlockId) -> BlockId | None:
        """A device block that gets a block's content, to be written further."""
        target = self._allocate(self._device, None)
        if target is not None:
            self._copies.append(BlockCopy(source=source, target=target))
        return target

    def _allocate(self, shelf: _Shelf, after: BlockId | None) -> BlockId | None:
        num_known = len(shelf.by_hash)
        block = shelf.pool.allocate(after)
        self.num_reclaimed += num_known - len(shelf.by_hash)
        if block is not None:
            self._stale.discard(block)
        return block

    def _release(self, blocks: Sequence[BlockId]) -> None:
        for block in reversed(blocks):  # the end of a chain is useless without its start: let it be reclaimed first
            pool = self._shelf(block).pool
            if pool.count(block) == 1 and block not in self._hash_of:
                self._provenance.pop(block, None)
                self._part(block)
                self._stale.add(block)
            pool.release(block)

    def _forget(self, block: BlockId) -> None:
        del self._shelf(block).by_hash[self._hash_of.pop(block)]
        del self._provenance[block]
        self._part(block)

    def _part(self, block: BlockId) -> None:
        """A block's content goes, or is no longer what its twin has."""
        twin = self._twins.pop(block, None)
        if twin is not None:
            del self._twins[twin]


def _hash(parent: bytes, content: bytes) -> BlockHash:
    # Cryptographic on purpose: a collision would show one conversation's KV to another.
    return hashlib.blake2b(len(parent).to_bytes(4, "little") + parent + content, digest_size=16).digest()


def _token_bytes(token_ids: Sequence[TokenId]) -> bytes:
    return array("q", token_ids).tobytes()
