"""The "dense" methods of both phases: everything, the baseline beside which one phase is sparse alone.

The scheduler orders no selection for them at all; chosen through the sparse path, as the tests do, they read everything too.
"""

import torch
from torch import Tensor

from loopserve.config import DecodeSparsity, PrefillSparsity
from loopserve.methods import DECODE_RULES
from loopserve.sparsity.decode import TokenChoice
from loopserve.sparsity.grid import LineSelection, TileGrid
from loopserve.sparsity.observation import Observation
from loopserve.sparsity.prefill import Mass


class DensePrefill:
    """Every tile of every head."""

    mass = Mass.NONE

    def settings(self, config: PrefillSparsity) -> PrefillSparsity:
        """See `PrefillMethod.settings`."""
        return config

    def choose(
        self, mass: Tensor, *, start: int, num_rows: int, alpha: float, config: PrefillSparsity
    ) -> LineSelection:
        """See `PrefillMethod.choose`; of `mass` [H, Q, N] only the shape and the device count."""
        return every_tile(TileGrid(start, num_rows, config.tile_tokens), mass.shape[0], mass.device)


class DenseDecode:
    """Every candidate, whatever the budget."""

    rule = DECODE_RULES["dense"]

    def choose(self, seen: Observation, *, config: DecodeSparsity, layer: int, num_layers: int) -> TokenChoice:
        """See `DecodeMethod.choose`."""
        every = torch.arange(seen.layout.num_candidates, device=seen.slots.device)
        return TokenChoice(every.expand(seen.num_lists, -1))


def every_tile(grid: TileGrid, num_heads: int, device: torch.device) -> LineSelection:
    """All tiles and no columns, for every head."""
    return LineSelection(
        torch.ones((num_heads, grid.num_diagonals), dtype=torch.bool, device=device),
        torch.zeros((num_heads, grid.num_columns), dtype=torch.bool, device=device),
    )
