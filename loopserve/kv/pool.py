"""Blocks of the device pool: reference counts and the free list. Host only; knows neither tokens nor sessions nor bytes.

Every block is in exactly one of these places, and who moves it on:

    free      nobody knows its content                 `allocate` takes it
    held      reference count >= 1                     the last `release` moves it to free, or to kept if it is marked
    kept      count 0, content may come back           `retain` holds it again; `allocate` takes the least recently released

A sequence whose blocks follow each other is read without a gather (on a CPU, half the time of a dense decode over 640 tokens and a
quarter over 2,500), so `allocate` tries to continue a run, and starts new runs at a distance from each other. A full pool gives up
on that: any block will do.

Block 0 is the null block: never handed out, so that padded slot indices have somewhere harmless to point.
"""

from collections import OrderedDict
from collections.abc import Callable

from loopserve.plan import NULL_BLOCK, BlockId

_RUN_SPACING_BLOCKS = 64  # distance between the starts of new runs: 1,024 tokens to grow before they meet


class BlockPool:
    """Hands out blocks. `on_reclaim` is told when a kept block loses its content, so that an index can forget it."""

    def __init__(self, num_blocks: int, *, on_reclaim: Callable[[BlockId], None]) -> None:
        assert num_blocks >= 2, "the pool needs the null block and at least one more"
        self.num_blocks = num_blocks
        self._on_reclaim = on_reclaim
        self._free = dict.fromkeys(BlockId(i) for i in range(NULL_BLOCK + 1, num_blocks))  # an ordered set
        self._next_run = NULL_BLOCK + 1
        self._counts = [0] * num_blocks
        self._kept: OrderedDict[BlockId, None] = OrderedDict()
        self._marked: set[BlockId] = set()

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks held by nobody whose content may still come back."""
        return len(self._kept)

    def count(self, block: BlockId) -> int:
        """How many holders the block has."""
        return self._counts[block]

    def allocate(self, after: BlockId | None = None) -> BlockId | None:
        """A block with one holder and unspecified content, or None when all are held. The one right after `after` if it is free."""
        block = self._take_free(after)
        if block is None and self._kept:
            block, _ = self._kept.popitem(last=False)
            self._marked.discard(block)
            self._on_reclaim(block)
        if block is not None:
            assert self._counts[block] == 0, f"block {block} is handed out while held"
            self._counts[block] = 1
        return block

    def retain(self, block: BlockId) -> None:
        """Add a holder to a held or kept block."""
        assert self._counts[block] > 0 or block in self._kept, f"block {block} is free and cannot be retained"
        if self._counts[block] == 0:
            del self._kept[block]
        self._counts[block] += 1

    def release(self, block: BlockId) -> None:
        """Drop one holder."""
        assert self._counts[block] > 0, f"block {block} is released more often than held"
        self._counts[block] -= 1
        if self._counts[block] == 0:
            if block in self._marked:
                self._kept[block] = None
            else:
                self._free[block] = None

    def mark(self, block: BlockId) -> None:
        """Keep the block's content when its last holder goes. Unmarked again when it is reclaimed."""
        assert self._counts[block] > 0, f"block {block} is marked while nobody holds it"
        self._marked.add(block)

    def check(self) -> None:
        """Assert that every block is in exactly one place."""
        held = sum(1 for count in self._counts if count > 0)
        assert len(self._free) + len(self._kept) + held == self.num_usable, "blocks are lost or counted twice"
        assert all(self._counts[block] == 0 for block in self._free), "a free block is held"
        assert all(self._counts[block] == 0 and block in self._marked for block in self._kept), "a kept block is wrong"
        assert self._counts[NULL_BLOCK] == 0, "the null block is held"

    def _take_free(self, after: BlockId | None) -> BlockId | None:
        if not self._free:
            return None
        if after is None:
            wanted = BlockId(self._next_run)
            self._next_run = self._next_run + _RUN_SPACING_BLOCKS
            if self._next_run >= self.num_blocks:
                self._next_run = NULL_BLOCK + 1
        else:
            wanted = BlockId(after + 1)
        block = wanted if wanted in self._free else next(iter(self._free))
        del self._free[block]
        return block
