"""What the device keeps of the turns in the batch, one row a turn. Floor 4 beside the model; filled by the runner.

The tensors are allocated once and never move, so that what reads them can be captured and replayed. Row 0 is nobody's: padding points
there, and its slots at the null block. Knows nothing about steps or models.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import TurnId
from loopserve.plan import NULL_BLOCK, PENDING_TOKEN, Segment
from loopserve.sparsity.decode import TurnSelection
from loopserve.transfer import on_device

NO_ROW = 0


@dataclass(slots=True)
class TurnRow:
    """One turn's row, and what only the host keeps of it."""

    index: int
    epoch: int  # of the block table that `slots` was filled from
    num_blocks: int = 0
    is_run: bool = True  # its blocks follow each other
    first_slot: int = 0
    selection: TurnSelection | None = None


class TurnTable:
    """Rows for `max_turns` turns of at most `max_tokens` tokens each."""

    def __init__(
        self,
        max_turns: int,
        max_tokens: int,
        *,
        value_shape: tuple[int, int, int] | None,
        device: torch.device,
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
        self._offsets = torch.arange(BLOCK_TOKENS, device=device)
        self._rows: dict[TurnId, TurnRow] = {}
        self._free = list(range(max_turns, NO_ROW, -1))

    def release(self, turn_ids: Iterable[TurnId]) -> None:
        """Turns that left the batch give their rows back; unknown ones are ignored."""
        for turn_id in turn_ids:
            row = self._rows.pop(turn_id, None)
            if row is not None:
                self._free.append(row.index)

    def row(self, segment: Segment) -> TurnRow:
        """The row of a segment's turn, brought up to date with its block table."""
        row = self._rows.get(segment.turn_id)
        if row is None:
            assert self._free, "more turns in the batch than the table has rows"
            row = self._rows[segment.turn_id] = TurnRow(self._free.pop(), segment.table_epoch)
        if row.epoch != segment.table_epoch:
            row.epoch, row.num_blocks, row.is_run = segment.table_epoch, 0, True
        if len(segment.block_table) > row.num_blocks:
            self._extend(row, segment)
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
        row.num_blocks, row.first_slot = len(table), table[0] * BLOCK_TOKENS
