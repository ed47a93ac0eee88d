"""The bytes of the KV pools, on the device and in host memory. Carries out copy orders and erasures; decides nothing.

Layout: one key and one value tensor a layer and tier, `[S, Hkv, D]`, S = blocks * 16 slots; slot = block * 16 + offset. Tokens of a
block lie side by side with all their heads, so a gather of whole tokens moves Hkv * D contiguous elements. Where a sketch of the keys is
wanted it lies by slot too, and is copied and erased with them; sketches of host blocks lie on the device as well, so that what is in
host memory can be ranked without being read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.config import BLOCK_TOKENS
from loopserve.kernels import store_sketch
from loopserve.kernels.sketch import KeySketch, sketch_bytes
from loopserve.plan import BlockCopy, BlockId
from loopserve.transfer import on_device


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens of one sequence that lie side by side on one tier."""

    first_token: int
    first_slot: int
    num_tokens: int


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
        num_host_blocks: int = 0,
    ) -> None:
        """Allocates `num_blocks` times `block_bytes` on the device, and the host's: zeroed, lazily on a CPU; pinned for CUDA."""
        token = (num_kv_heads, head_dim)
        self.num_slots = num_blocks * BLOCK_TOKENS  # on the device; host slots come after them
        num_host_slots = num_host_blocks * BLOCK_TOKENS
        is_pinned = device.type == "cuda" and num_host_slots > 0

        def on_tier() -> tuple[list[Tensor], list[Tensor]]:
            here, there = (self.num_slots, *token), (num_host_slots, *token)
            return (
                [torch.zeros(here, dtype=dtype, device=device) for _ in range(num_layers)],
                [torch.zeros(there, dtype=dtype, pin_memory=is_pinned) for _ in range(num_layers)],
            )

        self.keys, self.host_keys = on_tier()
        self.values, self.host_values = on_tier()
        num_sketched = self.num_slots + num_host_slots if sketch else 0
        self.sketches = [KeySketch.empty(num_sketched, *token, device) for _ in range(num_layers)] if sketch else []
        # The same memory as [1, Hkv, S, D]: attention over a run of slots then needs one narrowing a layer, not three views.
        self.keys_by_head = [pool.transpose(0, 1).unsqueeze(0) for pool in self.keys]
        self.values_by_head = [pool.transpose(0, 1).unsqueeze(0) for pool in self.values]

    @property
    def device(self) -> torch.device:
        """Where the device tier lies."""
        return self.keys[0].device

    @property
    def device_bytes(self) -> int:
        """What the device tier takes: keys, values and all sketches."""
        tensors = [*self.keys, *self.values]
        tensors += [part for sketch in self.sketches for part in (sketch.signs, sketch.scales)]
        return sum(tensor.nbytes for tensor in tensors)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out copy orders, within a tier or between two, one after the other: a later one may read what an earlier one wrote.

        On CUDA they are queued, in the order of everything else.
        """
        for first, num_blocks in _runs(copies, self.num_slots // BLOCK_TOKENS):
            num_slots = num_blocks * BLOCK_TOKENS
            source, target = first.source * BLOCK_TOKENS, first.target * BLOCK_TOKENS
            for layer in range(len(self.keys)):
                for to, what in zip(
                    self.slots(layer, target, num_slots), self.slots(layer, source, num_slots), strict=True
                ):
                    to.copy_(what, non_blocking=True)
            for sketch in self.sketches:
                for part in (sketch.signs, sketch.scales):
                    part[target : target + num_slots] = part[source : source + num_slots]

    def erase_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Zero whole blocks in every layer; they are zero when this returns."""
        self.settle()  # copies that are queued may still read or write host memory
        num_blocks = self.num_slots // BLOCK_TOKENS
        here = [block for block in blocks if block < num_blocks]
        there = [block - num_blocks for block in blocks if block >= num_blocks]
        _zero([*self.keys, *self.values], here)
        _zero([*self.host_keys, *self.host_values], there)
        _zero([part for sketch in self.sketches for part in (sketch.signs, sketch.scales)], blocks)
        self.settle()  # kernels are only queued so far, and somebody is told that it is done

    def read_blocks(self, blocks: Sequence[BlockId]) -> tuple[Tensor, Tensor]:
        """Keys and values of B whole blocks of either tier, on the CPU: [L, B, 16, Hkv, D] each, copied."""
        shape = (len(self.keys), len(blocks), BLOCK_TOKENS, *self.keys[0].shape[1:])
        keys, values = (torch.empty(shape, dtype=self.keys[0].dtype) for _ in range(2))
        for first, length in self._stretches(blocks):
            for layer in range(len(self.keys)):
                here = self.slots(layer, blocks[first] * BLOCK_TOKENS, length * BLOCK_TOKENS)
                for to, what in zip((keys, values), here, strict=True):
                    to[layer, first : first + length].flatten(0, 1).copy_(what)
        return keys, values

    def write_blocks(self, blocks: Sequence[BlockId], keys: Tensor, values: Tensor) -> None:
        """Fill B whole blocks of either tier, as `read_blocks` gave them, and their sketches."""
        for first, length in self._stretches(blocks):
            first_slot, num_slots = blocks[first] * BLOCK_TOKENS, length * BLOCK_TOKENS
            for layer in range(len(self.keys)):
                here = self.slots(layer, first_slot, num_slots)
                for to, what in zip(here, (keys, values), strict=True):
                    to.copy_(what[layer, first : first + length].flatten(0, 1))
            for layer, sketch in enumerate(self.sketches):
                new = keys[layer, first : first + length].flatten(0, 1).to(self.device)
                store_sketch(new, sketch, torch.arange(first_slot, first_slot + num_slots, device=self.device))

    def slots(self, layer: int, first_slot: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots that follow each other on one tier, [num_slots, Hkv, D] each; views."""
        keys, values = self.keys[layer], self.values[layer]
        if first_slot >= self.num_slots:
            first_slot -= self.num_slots
            keys, values = self.host_keys[layer], self.host_values[layer]
        return keys[first_slot : first_slot + num_slots], values[first_slot : first_slot + num_slots]

    def _stretches(self, blocks: Sequence[BlockId]) -> Iterator[tuple[int, int]]:
        """Where blocks that follow each other on one tier begin in a list, and how many they are."""
        first_of_host, first = self.num_slots // BLOCK_TOKENS, 0
        for place in range(1, len(blocks) + 1):
            goes_on = place < len(blocks) and blocks[place] == blocks[place - 1] + 1 != first_of_host
            if not goes_on:
                yield first, place - first
                first = place

    def settle(self) -> None:
        """Wait until all that was queued is done, so that the host may read and write what lies in its memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def block_bytes(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, sketch: bool = False) -> int:
    """Bytes of one block, all layers: keys, values and, if there is one, the sketch of the keys."""
    a_token = 2 * head_dim * dtype.itemsize + (sketch_bytes(head_dim) if sketch else 0)
    return num_layers * BLOCK_TOKENS * num_kv_heads * a_token


def _runs(copies: Sequence[BlockCopy], first_of_host: int) -> Iterator[tuple[BlockCopy, int]]:
    """Copy orders as the first one and how many follow each other in source and target alike; none of a run reads what it writes, or
    crosses from one tier to the other."""
    first, length = None, 0
    for copy in copies:
        if first is not None:
            follows = (copy.source - first.source, copy.target - first.target) == (length, length)
            follows &= first_of_host not in (copy.source, copy.target)
            if follows and abs(first.target - first.source) > length:
                length += 1
                continue
            yield first, length
        first, length = copy, 1
    if first is not None:
        yield first, length


def _zero(pools: Sequence[Tensor], blocks: Sequence[int]) -> None:
    if not pools or not blocks:
        return
    device = pools[0].device
    starts = on_device(blocks, device, dtype=torch.long).unsqueeze(1) * BLOCK_TOKENS
    slots = (starts + torch.arange(BLOCK_TOKENS, device=device)).flatten()  # [blocks * 16]
    for pool in pools:
        pool.index_fill_(0, slots, 0)
