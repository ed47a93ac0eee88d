"""The "flexprefill" prefill method: diagonals that cover gamma, and columns that cover gamma too. Source: FlexPrefill, arXiv 2502.20766.

As its public code has it: the last 128 rows are scored, the first columns and the nearest diagonals always read, and each kind of line is
added, heaviest first, until it holds gamma of the weight by itself, however much the other holds: gamma is the `alpha` of the turn. Here
for each chunk, on tiles of `tile_tokens` (its blocks are 128 wide, columns included). Its other mode, in which heads whose pooled
estimate agrees with the weights choose single blocks, is left out: it is no choice of lines.
"""

from dataclasses import replace

import torch
from torch import Tensor

from loopserve.config import PrefillSparsity
from loopserve.kernels import mass_per_tile
from loopserve.sparsity.dense import every_tile
from loopserve.sparsity.grid import LineSelection, TileGrid, local_diagonals
from loopserve.sparsity.lines import best_tiles, with_columns
from loopserve.sparsity.prefill import Mass

_ROWS = 128


class FlexPrefill:
    """Two covers, each for itself."""

    mass = Mass.PER_TILE

    def settings(self, config: PrefillSparsity) -> PrefillSparsity:
        """See `PrefillMethod.settings`."""
        return replace(config, sampled_rows=_ROWS, row_sampling="last")

    def choose(
        self, mass: Tensor, *, start: int, num_rows: int, alpha: float, config: PrefillSparsity
    ) -> LineSelection:
        """See `PrefillMethod.choose`."""
        grid = TileGrid(start, num_rows, config.tile_tokens)
        if alpha >= 1.0:
            return every_tile(grid, mass.shape[0], mass.device)
        per_tile = mass_per_tile(mass, None, start=start, tile_tokens=grid.tile_tokens)
        target = alpha * per_tile.whole.sum(dim=(1, 2))  # [H]
        local = local_diagonals(grid, config.local_tokens, mass.device)
        tiles = best_tiles(per_tile, grid, target=target, local=local, least_gain=torch.zeros_like(target)[:, None])
        return with_columns(mass.sum(dim=1), target, tiles, min(config.sink_tokens, grid.num_columns))
