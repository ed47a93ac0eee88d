"""What the device keeps of the turns in the batch, one row a turn. Floor 4 beside the model; filled by the runner.

The tensors are allocated once and never move, so that what reads them can be captured and replayed. Row 0 is nobody's: padding points
there, and its slots at the null block. Knows nothing about steps or models.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import TurnId
from loopserve.kv.store import Stretch
from loopserve.kv.working_set import WorkingSets
from loopserve.plan import NULL_BLOCK, PENDING_TOKEN, BlockId, Segment
from loopserve.sparsity.decode import TurnSelection
from loopserve.transfer import on_device

NO_ROW = 0


@dataclass(slots=True)
class TurnRow:
    """One turn's row, and what only the host keeps of it."""

    index: int
    epoch: int  # of the block table that `slots` was filled from
    num_blocks: int = 0
    places: tuple[BlockId, ...] = ()
    is_run: bool = True  # its blocks follow each other on the device
    is_far: bool = False  # some of its blocks lie in host memory
    first_slot: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    selection: TurnSelection | None = None


class TurnTable:
    """Rows for `max_turns` turns of at most `max_tokens` tokens each."""

    def __init__(
        self,
        max_turns: int,
        max_tokens: int,
        *,
        first_host_slot: int,
        value_shape: tuple[int, int, int] | None,
        device: torch.device,
        working_sets: WorkingSets | None = None,
    ) -> None:
        """Allocates 8 * max_turns * max_tokens bytes (lazily, on a CPU), and 4 for each entry of the value sums."""
        assert NULL_BLOCK == 0, "zeroed slots lie in the null block"
        num_slots = -(-max_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        self.slots = torch.zeros((max_turns + 1, num_slots), dtype=torch.int64, device=device)
        # Of all tokens of each turn, layer by layer, where somebody wants their mean: float32 [rows, L, Hkv, D].
        self.value_sums = None if value_shape is None else torch.zeros((max_turns + 1, *value_shape), device=device)
        self.last_tokens = torch.zeros(
            max_turns + 1, dtype=torch.int64, device=device
        )  # drawn by each turn's last step
        self.working_sets = working_sets  # where turns can be compact
        self._first_host_slot = first_host_slot
        self._offsets = torch.arange(BLOCK_TOKENS, device=device)
        self._rows: dict[TurnId, TurnRow] = {}
        self._free = list(range(max_turns, NO_ROW, -1))

    @property
    def device_bytes(self) -> int:
        """What the tensors take on the device, turns' selections included. May be asked from any thread."""
        sums = 0 if self.value_sums is None else self.value_sums.nbytes
        places = 0 if self.working_sets is None else self.working_sets.device_bytes
        selections = sum(row.selection.device_bytes for row in list(self._rows.values()) if row.selection is not None)
        return self.slots.nbytes + self.last_tokens.nbytes + sums + places + selections

    def release(self, turn_ids: Iterable[TurnId]) -> None:
        """Turns that left the batch give their rows back; unknown ones are ignored."""
        for turn_id in turn_ids:
            row = self._rows.pop(turn_id, None)
            if row is not None:
                self._free.append(row.index)
                if row.places and self.working_sets is not None:
                    self.working_sets.clear(row.index)

    def row(self, segment: Segment) -> TurnRow:
        """The row of a segment's turn, brought up to date with its block table."""
        row = self._rows.get(segment.turn_id)
        if row is None:
            assert self._free, "more turns in the batch than the table has rows"
            row = self._rows[segment.turn_id] = TurnRow(self._free.pop(), segment.table_epoch)
        if row.epoch != segment.table_epoch:
            row.epoch, row.num_blocks, row.is_run, row.is_far = segment.table_epoch, 0, True, False
            row.stretches.clear()
        if len(segment.block_table) > row.num_blocks:
            self._extend(row, segment)
        if row.places != (places := tuple(segment.places)):
            assert self.working_sets is not None, "only where there is a host tier, turns have places"
            both = zip(row.places, places, strict=False)
            num_kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
            self.working_sets.resize(row.index, places, num_kept)
            row.places = places
        return row

    def slots_of(self, row: TurnRow, num_tokens: int) -> Tensor:
        """Where the first `num_tokens` tokens of a turn lie, int64 [num_tokens]; a view that follows the table."""
        return self.slots[row.index, :num_tokens]

    def resolved(self, token_ids: Tensor, turn_rows: Tensor) -> Tensor:
        """Token ids [R] in which `PENDING_TOKEN` is what its turn drew last; `turn_rows` int64 [R]."""
        return torch.where(token_ids == PENDING_TOKEN, self.last_tokens[turn_rows], token_ids)

    def note_tokens(self, turn_rows: Tensor, token_ids: Tensor) -> None:
        """Keep what was drawn, int64 [R] each."""
        self.last_tokens.index_copy_(0, turn_rows, token_ids)

    def _extend(self, row: TurnRow, segment: Segment) -> None:
        table, known = segment.block_table, row.num_blocks
        fresh = on_device(table[known:], self.slots.device)
        before = table[max(0, known - 1) : -1]
        row.is_run &= all(b == a + 1 for a, b in zip(before, table[max(1, known) :], strict=True))
        slots = (fresh.unsqueeze(1) * BLOCK_TOKENS + self._offsets).flatten()
        self.slots[row.index, known * BLOCK_TOKENS : len(table) * BLOCK_TOKENS] = slots
        for number in range(known, len(table)):
            _append(row.stretches, number * BLOCK_TOKENS, table[number] * BLOCK_TOKENS, self._first_host_slot)
        row.num_blocks, row.first_slot = len(table), table[0] * BLOCK_TOKENS
        row.is_far = any(stretch.first_slot >= self._first_host_slot for stretch in row.stretches)
        row.is_run &= not row.is_far


def _append(stretches: list[Stretch], first_token: int, first_slot: int, first_host_slot: int) -> None:
    """Add one block, to the last stretch where it goes on on the same tier."""
    last = stretches[-1] if stretches else None
    if last is not None and last.first_slot + last.num_tokens == first_slot != first_host_slot:
        stretches[-1] = replace(last, num_tokens=last.num_tokens + BLOCK_TOKENS)
    else:
        stretches.append(Stretch(first_token, first_slot, BLOCK_TOKENS))
