"""The bytes of the KV pool on one device. Carries out copy orders and erasures; decides nothing.

Layout: one key and one value tensor a layer, `[S, Hkv, D]`, S = num_blocks * 16 slots; slot = block * 16 + offset. Tokens of a
block lie side by side with all their heads, so a gather of whole tokens moves Hkv * D contiguous elements. Where a sketch of the keys is
wanted it lies by slot too, and is copied and erased with them.
"""

from collections.abc import Iterator, Sequence

import torch

from loopserve.config import BLOCK_TOKENS
from loopserve.kernels.sketch import KeySketch, sketch_bytes
from loopserve.plan import BlockCopy, BlockId
from loopserve.transfer import on_device


class KVStore:
    """Keys and values of every layer."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        sketch: bool = False,
    ) -> None:
        """Allocates `num_blocks` times `block_bytes`, zeroed (lazily, on a CPU)."""
        shape = (num_blocks * BLOCK_TOKENS, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.sketches = [KeySketch.empty(*shape, device) for _ in range(num_layers)] if sketch else []
        # The same memory as [1, Hkv, S, D]: attention over a run of slots then needs one narrowing a layer, not three views.
        self.keys_by_head = [pool.transpose(0, 1).unsqueeze(0) for pool in self.keys]
        self.values_by_head = [pool.transpose(0, 1).unsqueeze(0) for pool in self.values]

    @property
    def num_slots(self) -> int:
        """Places for one token's keys and values."""
        return self.keys[0].shape[0]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out copy orders one after the other: a later one may read what an earlier one wrote."""
        for copy in copies:
            source, target = _slots_of(copy.source), _slots_of(copy.target)
            for pool in self._pools():
                pool[target] = pool[source]

    def erase_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Zero whole blocks in every layer; they are zero when this returns."""
        device = self.keys[0].device
        starts = on_device(blocks, device, dtype=torch.long).unsqueeze(1) * BLOCK_TOKENS
        slots = (starts + torch.arange(BLOCK_TOKENS, device=device)).flatten()  # [blocks * 16]
        for pool in self._pools():
            pool.index_fill_(0, slots, 0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels are only queued so far, and somebody is told that it is done

    def _pools(self) -> Iterator[torch.Tensor]:
        """All that lies by slot."""
        yield from (*self.keys, *self.values)
        for sketch in self.sketches:
            yield from (sketch.signs, sketch.scales)


def block_bytes(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, sketch: bool = False) -> int:
    """Bytes of one block, all layers: keys, values and, if there is one, the sketch of the keys."""
    a_token = 2 * head_dim * dtype.itemsize + (sketch_bytes(head_dim) if sketch else 0)
    return num_layers * BLOCK_TOKENS * num_kv_heads * a_token


def _slots_of(block: int) -> slice:
    return slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
