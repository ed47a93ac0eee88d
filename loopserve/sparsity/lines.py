"""The "lines" prefill method: slash tiles and vertical columns per query head, until they hold a share alpha of the sampled weight.

Source: phase 1 of arXiv 2507.13681, which adds lines greedily until their union holds alpha; choosing the least lines is a set
cover. A greedy that goes line by line cannot run on a device, so the union is reached in three batched steps (`_union`), none of which
waits for the device.
"""

import torch
from torch import Tensor

from loopserve.config import PrefillSparsity
from loopserve.kernels import coverage_threshold, mass_outside_tiles, mass_per_tile
from loopserve.kernels.mass_per_tile import TileMass
from loopserve.sparsity.dense import every_tile
from loopserve.sparsity.grid import LineSelection, TileGrid, local_diagonals
from loopserve.sparsity.prefill import Mass

_CHANCE = 3.0  # times its mean weight that a vertical may weigh in one query tile by chance: 1 chose up to half again as many cells


class Lines:
    """Slash tiles by gain per computed cell, then verticals by the weight that no chosen tile holds."""

    mass = Mass.PER_TILE

    def settings(self, config: PrefillSparsity) -> PrefillSparsity:
        """See `PrefillMethod.settings`."""
        return config

    def choose(
        self, mass: Tensor, *, start: int, num_rows: int, alpha: float, config: PrefillSparsity
    ) -> LineSelection:
        """See `PrefillMethod.choose`."""
        grid = TileGrid(start, num_rows, config.tile_tokens)
        num_heads, device = mass.shape[0], mass.device
        if alpha >= 1.0:
            return every_tile(grid, num_heads, device)
        num_sinks = min(config.sink_tokens, grid.num_columns)
        local = local_diagonals(grid, config.local_tokens, device)
        return _union(mass, grid, alpha=alpha, num_sinks=num_sinks, local=local)


def _union(mass: Tensor, grid: TileGrid, *, alpha: float, num_sinks: int, local: Tensor) -> LineSelection:
    """Tiles and columns that hold alpha of each head's weight together.

    1. tau: the weight of the last column needed if columns alone, heaviest first, had to hold alpha.
    2. Tile-diagonals, local ones first, then by what they add for each column's worth of computed cells, as long as that is at
       least tau (such a tile is no worse than the columns it replaces) and alpha is not yet held. What verticals will hold anyway
       is not added: one heavy column would else pull in every tile that it crosses.
    3. Columns by the weight that no chosen tile holds, heaviest first, until tiles and columns together hold alpha.
    """
    vertical = _vertical_mass(mass)  # [H, N]
    tau = coverage_threshold(vertical, alpha * vertical.sum(dim=1))[:, None]  # [H, 1]
    held_anyway = vertical.masked_fill(vertical < tau, 0.0) / mass.shape[1]  # by verticals, in each query tile
    per_tile = mass_per_tile(mass, _CHANCE * held_anyway, start=grid.start, tile_tokens=grid.tile_tokens)
    target = alpha * per_tile.whole.sum(dim=(1, 2))  # [H]
    tiles = best_tiles(per_tile, grid, target=target, local=local, least_gain=tau)
    inside, outside = mass_outside_tiles(mass, tiles, start=grid.start, tile_tokens=grid.tile_tokens)
    return with_columns(outside, target - inside, tiles, num_sinks)


def _vertical_mass(mass: Tensor) -> Tensor:
    """Weight of each column [H, N] as all query tiles but its heaviest have it, scaled up to all of them.

    A column that is heavy for one tile's sampled rows alone lies on a slash as likely as not, and the next rows will look beside it.
    """
    num_tiles = mass.shape[1]
    if num_tiles == 1:
        return mass[:, 0]
    return (mass.sum(dim=1) - mass.amax(dim=1)) * (num_tiles / (num_tiles - 1))


def best_tiles(per_tile: TileMass, grid: TileGrid, *, target: Tensor, local: Tensor, least_gain: Tensor) -> Tensor:
    """Tile-diagonals, local first, then by gain down to `least_gain` [H, 1], until they hold `target` [H]; bool [H, T].

    Gain is the part of a diagonal's weight in `per_tile.added` for each column's worth (num_rows) of cells that it computes, so that it
    compares with a column's weight.
    """
    weight = grid.along_diagonals(per_tile.whole)  # [H, T]
    gain = grid.along_diagonals(per_tile.added) * grid.num_rows / grid.diagonal_cells(weight.device)
    order = gain.masked_fill(local, torch.inf).argsort(dim=1, descending=True)
    num_needed = _num_until(weight.gather(1, order), target)
    needed = torch.arange(grid.num_diagonals, device=weight.device) < num_needed[:, None]
    return local | (torch.zeros_like(needed).scatter_(1, order, needed) & (gain >= least_gain))


def with_columns(weight: Tensor, missing: Tensor, tiles: Tensor, num_sinks: int) -> LineSelection:
    """Add the sinks, then columns by `weight` [H, N], heaviest first, until `missing` [H] is held."""
    in_sinks = weight[:, :num_sinks].sum(dim=1)
    others = weight.clone()
    others[:, :num_sinks].zero_()
    verticals = others >= coverage_threshold(others, missing - in_sinks)[:, None]
    verticals[:, :num_sinks].fill_(True)
    return LineSelection(tiles, verticals)


def _num_until(weights: Tensor, target: Tensor) -> Tensor:
    """How many leading entries of `weights` [H, X] it takes until their sum reaches `target` [H], int64 [H]; at most X."""
    # Summed in float64: over tens of thousands of columns the rounding of a float32 running sum would decide the count.
    before = weights.double().cumsum(dim=1) - weights
    return (before < target[:, None]).sum(dim=1)
