"""The "fixed_lines" prefill method: so many columns and so many diagonals, whatever they hold. Source: MInference, arXiv 2407.02490.

Its vertical-slash pattern as its public code has it: the last 64 rows are scored; the heaviest columns and diagonals are read, at least
30 and 50 of them, the first 30 columns and the last 100 diagonals among them by force. How many is fixed for a head, there by a
search over each model, here by `fixed_columns` and `fixed_diagonals` for all heads. Diagonals are read as the tiles they cross, there as
here; here for each chunk, and over whatever is cached before it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from loopserve.config import PrefillSparsity
from loopserve.sparsity.dense import every_tile
from loopserve.sparsity.grid import LineSelection, TileGrid
from loopserve.sparsity.prefill import Mass

_ROWS = 64
_FORCED_COLUMNS = 30
_FORCED_DIAGONALS = 100
_LEAST_COLUMNS = 30
_LEAST_DIAGONALS = 50


class FixedLines:
    """Top columns and top diagonals by the last rows' weight."""

    mass = Mass.PER_ROW

    def settings(self, config: PrefillSparsity) -> PrefillSparsity:
        """See `PrefillMethod.settings`."""
        return replace(config, sampled_rows=_ROWS, row_sampling="last")

    def choose(
        self, mass: Tensor, *, start: int, num_rows: int, alpha: float, config: PrefillSparsity
    ) -> LineSelection:
        """See `PrefillMethod.choose`; of `alpha` only 1.0 counts."""
        grid = TileGrid(start, num_rows, config.tile_tokens)
        num_heads, num_columns = mass.shape[0], grid.num_columns
        if alpha >= 1.0:
            return every_tile(grid, num_heads, mass.device)
        columns = mass.sum(dim=1)
        columns[:, :_FORCED_COLUMNS].fill_(torch.inf)
        columns = columns.topk(_count(config.fixed_columns, _LEAST_COLUMNS, num_columns, config), dim=1).indices
        offsets = offset_mass(mass, num_columns)
        offsets[:, :_FORCED_DIAGONALS].fill_(torch.inf)
        offsets = offsets.topk(_count(config.fixed_diagonals, _LEAST_DIAGONALS, num_columns, config), dim=1).indices
        verticals = torch.zeros((num_heads, num_columns), dtype=torch.bool, device=mass.device)
        return LineSelection(tiles_of(offsets, grid), verticals.scatter_(1, columns, True))


def offset_mass(mass: Tensor, num_columns: int) -> Tensor:
    """Weight on each diagonal, [H, N] by offset (0: a row's own token), of the last R rows' weights [H, R, N]."""
    num_rows = mass.shape[1]
    positions = torch.arange(num_columns - num_rows, num_columns, device=mass.device)
    columns = positions[:, None] - torch.arange(num_columns, device=mass.device)  # [R, N]
    along = mass.gather(2, columns.clamp(min=0).expand(mass.shape))
    return along.masked_fill(columns < 0, 0.0).sum(dim=1)


def tiles_of(offsets: Tensor, grid: TileGrid) -> Tensor:
    """Tile-diagonals that the diagonals at `offsets` [H, K] cross, bool [H, T]: one each, or two where they are not aligned."""
    first = offsets.div(grid.tile_tokens, rounding_mode="floor")
    second = (first + (offsets % grid.tile_tokens > 0)).clamp(max=grid.num_diagonals - 1)
    tiles = torch.zeros((offsets.shape[0], grid.num_diagonals), dtype=torch.bool, device=offsets.device)
    return tiles.scatter_(1, torch.cat((first, second), dim=1), True)


def _count(wanted: int, least: int, num_columns: int, config: PrefillSparsity) -> int:
    scaled = wanted * min(num_columns, config.fixed_at_tokens) // config.fixed_at_tokens
    return min(num_columns, max(least, scaled))
