"""What compact turns hold on the device of a history that lies in host memory: chosen tokens, in places.

Floor 2 beside the store. A turn's places are slots of device blocks; each layer and KV head keeps tokens of its own in them:

    place        0     1     2     3   ...        of one turn, a slot each
    layer 0, 0   t4    t91   -     t7             held: the token whose key and value lie there, -1 for none
    layer 0, 1   t4    t20   t8    t91
    ...

Whoever chose tokens asks where they lie; what is missing is brought from host memory into places of tokens that are not wanted now. All of
it is tensors whose shapes say what is computed: nothing comes back to the host. Knows nothing about how tokens are chosen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve.config import BLOCK_TOKENS
from loopserve.kernels import compact_kv
from loopserve.kv.store import KVStore
from loopserve.plan import BlockId
from loopserve.transfer import on_device


class WorkingSets:
    """The places of `max_turns` turns, one row a turn; row 0 is nobody's and has none."""

    def __init__(self, store: KVStore, max_turns: int, max_places: int) -> None:
        """Allocates 8 * places + 4 * L * Hkv * places bytes for each turn."""
        num_layers, num_kv_heads = len(store.keys), store.keys[0].shape[1]
        num_places = -(-max_places // BLOCK_TOKENS) * BLOCK_TOKENS
        device = store.device
        self._store = store
        self._slots = torch.zeros((max_turns + 1, num_places), dtype=torch.int64, device=device)
        self._num_places = torch.zeros(max_turns + 1, dtype=torch.int64, device=device)
        self._held = torch.full(
            (max_turns + 1, num_layers, num_kv_heads, num_places), -1, dtype=torch.int32, device=device
        )
        self._numbers = torch.arange(num_places, device=device)
        self._offsets = torch.arange(BLOCK_TOKENS, device=device)
        self.num_recalled = torch.zeros(
            (), dtype=torch.int64, device=device
        )  # tokens brought so far, by layer and head

    @property
    def max_places(self) -> int:
        """Places that one turn can have."""
        return self._slots.shape[1]

    @property
    def device_bytes(self) -> int:
        """What the maps take on the device."""
        return self._slots.nbytes + self._num_places.nbytes + self._held.nbytes

    def clear(self, row: int) -> None:
        """The row's turn holds nothing and has no places."""
        self._held[row].fill_(-1)
        self._num_places[row] = 0

    def resize(self, row: int, blocks: Sequence[BlockId], num_before: int) -> None:
        """Give a row's turn these blocks as places; the first `num_before` of them it has already, and what is in them stays."""
        kept, now = min(num_before, len(blocks)) * BLOCK_TOKENS, len(blocks) * BLOCK_TOKENS
        assert now <= self.max_places, "a turn has more places than the table"
        fresh = on_device(blocks[kept // BLOCK_TOKENS :], self._slots.device, dtype=torch.long)
        self._slots[row, kept:now] = (fresh.unsqueeze(1) * BLOCK_TOKENS + self._offsets).flatten()
        self._held[row, :, :, kept:].fill_(-1)
        self._num_places[row] = now

    def locate(
        self, layer: int, turn_rows: Tensor, slots: Tensor, columns: Tensor, valid: Tensor | None, *, late: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The device slots of chosen columns, int64 [R, Hkv, M], and which of them may be read, bool or None: all.

        turn_rows int64 [R]; slots int64 [R, N]: where column c of row r lies, on either tier; columns int64 [R, Hkv, M], distinct in each
        list where `valid`. What lies in host memory is brought, and a turn must have a place for each such column of a list. `late`: what
        has to be brought may not be read yet, by this call's answer.
        """
        lies_at = slots.gather(1, columns.flatten(1)).view(columns.shape)
        is_far = lies_at >= self._store.num_slots
        if valid is not None:
            is_far &= valid
        held = self._held[turn_rows, layer]  # [R, Hkv, P]
        place = _place_of(held, columns, slots.shape[1])  # -1: not held
        is_missing = is_far & (place < 0)
        place = torch.where(is_missing, self._spare_places(turn_rows, place, is_far, is_missing), place)
        at_place = self._slots[turn_rows].gather(1, place.clamp(min=0).flatten(1)).view(place.shape)
        compact_kv(
            self._store.host_keys[layer],
            self._store.host_values[layer],
            torch.where(is_missing, lies_at - self._store.num_slots, -1),
            self._store.keys[layer],
            self._store.values[layer],
            at_place,
        )
        self._held[turn_rows, layer] = _with(held, place, columns, is_missing)
        self.num_recalled += is_missing.sum()
        if late:
            valid = ~is_missing if valid is None else valid & ~is_missing
        located = torch.where(is_far, at_place, lies_at)
        return located.clamp_(max=self._store.num_slots - 1), valid  # what is not valid may lie anywhere

    def _spare_places(self, turn_rows: Tensor, place: Tensor, is_far: Tensor, is_missing: Tensor) -> Tensor:
        """A place for each missing column, int64 [R, Hkv, M]: of those that hold nothing wanted now, one after the other."""
        num_places = self.max_places
        is_taken = (self._numbers >= self._num_places[turn_rows, None])[:, None].expand(-1, place.shape[1], -1)
        is_taken = torch.nn.functional.pad(is_taken, (0, 1))  # a last one, for who wants none
        is_taken.scatter_(2, torch.where(is_far & (place >= 0), place, num_places), True)
        is_spare = ~is_taken[:, :, :num_places]
        turn = torch.where(is_spare, is_spare.cumsum(2) - 1, num_places)
        spare = torch.zeros_like(is_taken, dtype=torch.int64)
        spare.scatter_(2, turn, self._numbers.expand_as(turn).contiguous())
        wanted = (is_missing.cumsum(2) - 1).clamp(min=0, max=num_places - 1)
        return spare.gather(2, wanted)


def _place_of(held: Tensor, columns: Tensor, num_columns: int) -> Tensor:
    """The place in `held` int32 [R, Hkv, P] of each column [R, Hkv, M], or -1."""
    num_rows, num_heads, num_places = held.shape
    by_column = torch.full((num_rows, num_heads, num_columns + 1), -1, dtype=torch.int64, device=held.device)
    numbers = torch.arange(num_places, device=held.device).expand_as(held)
    by_column.scatter_(2, torch.where(held < 0, num_columns, held).long(), numbers)
    by_column[:, :, num_columns] = -1
    return by_column.gather(2, columns)


def _with(held: Tensor, place: Tensor, columns: Tensor, is_new: Tensor) -> Tensor:
    """`held` with the new columns in their places."""
    num_places = held.shape[2]
    wider = torch.nn.functional.pad(held, (0, 1))  # a last one, for what is not new
    wider.scatter_(2, torch.where(is_new, place, num_places), columns.to(held.dtype))
    return wider[:, :, :num_places]
