"""The "a_shape" prefill method: sinks and local diagonals for every head, whatever the weights say.

The pattern of StreamingLLM (arXiv 2309.17453) applied to prefill; here it is the baseline that every scored choice must beat.
"""

import torch
from torch import Tensor

from loopserve.config import PrefillSparsity
from loopserve.sparsity.grid import LineSelection, TileGrid, local_diagonals
from loopserve.sparsity.prefill import Mass


class AShape:
    """Always the first `sink_tokens` columns and the last `local_tokens` offsets; alpha 1.0 still means everything."""

    mass = Mass.NONE

    def settings(self, config: PrefillSparsity) -> PrefillSparsity:
        """See `PrefillMethod.settings`."""
        return config

    def choose(
        self, mass: Tensor, *, start: int, num_rows: int, alpha: float, config: PrefillSparsity
    ) -> LineSelection:
        """See `PrefillMethod.choose`; of `mass` [H, Q, N] only the shape and the device count."""
        grid = TileGrid(start, num_rows, config.tile_tokens)
        num_heads, device = mass.shape[0], mass.device
        num_sinks = 0 if alpha >= 1.0 else min(config.sink_tokens, grid.num_columns)
        tiles = local_diagonals(grid, config.local_tokens, device) | (alpha >= 1.0)
        verticals = torch.arange(grid.num_columns, device=device) < num_sinks
        return LineSelection(tiles.expand(num_heads, -1), verticals.expand(num_heads, -1))
