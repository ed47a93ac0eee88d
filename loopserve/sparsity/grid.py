"""The lines of one chunk as data: the grid of tiles they lie on, and a selection with its exact size and the weight it holds.

The grid is aligned to the chunk's first row and is drawn in `loopserve.kernels.sparse_prefill`. Here key tiles count from 0
at the oldest, so that tile-diagonal t of query tile q is key tile q + P - t. Knows nothing about how lines are chosen.

Letters: H query heads, Q query tiles, K key tiles, P past key tiles (K = P + Q), T tile-diagonals (T = K), N columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tiles of `tile_tokens` over `num_rows` new rows and `start + num_rows` columns; the oldest key tile may be cut short."""

    start: int
    num_rows: int
    tile_tokens: int

    @property
    def num_columns(self) -> int:
        """Cached and new tokens, N."""
        return self.start + self.num_rows

    @property
    def num_query_tiles(self) -> int:
        """Q; the last may be cut short."""
        return -(-self.num_rows // self.tile_tokens)

    @property
    def num_past_tiles(self) -> int:
        """P; the first may be cut short."""
        return -(-self.start // self.tile_tokens)

    @property
    def num_diagonals(self) -> int:
        """T, as `sparse_prefill` counts them."""
        return self.num_query_tiles + self.num_past_tiles

    @property
    def num_cells(self) -> int:
        """Causal cells of one head: what dense attention computes."""
        return self.num_rows * self.start + self.num_rows * (self.num_rows + 1) // 2

    def key_tile(self, columns: Tensor) -> Tensor:
        """Key tile of each column, in [0, K); int64, shaped as `columns`."""
        return (columns - self.start).div(self.tile_tokens, rounding_mode="floor") + self.num_past_tiles

    def diagonal(self, device: torch.device) -> Tensor:
        """Tile-diagonal of every (query tile, key tile), int64 [Q, K]; negative in the future."""
        query_tile = torch.arange(self.num_query_tiles, device=device)[:, None]
        return query_tile + self.num_past_tiles - torch.arange(self.num_diagonals, device=device)

    def per_key_tile(self, per_column: Tensor) -> Tensor:
        """Sum [..., N] inside each key tile: [..., K]."""
        front = self.num_past_tiles * self.tile_tokens - self.start
        back = self.num_query_tiles * self.tile_tokens - self.num_rows
        padded = pad(per_column, (front, back))
        return padded.view(*per_column.shape[:-1], self.num_diagonals, self.tile_tokens).sum(dim=-1)

    def along_diagonals(self, per_tile: Tensor) -> Tensor:
        """Sum [..., Q, K] over the tiles of each tile-diagonal: [..., T]."""
        query_tile = torch.arange(self.num_query_tiles, device=per_tile.device)[:, None]
        key_tile = query_tile + self.num_past_tiles - torch.arange(self.num_diagonals, device=per_tile.device)  # [Q, T]
        # Gathered, not scattered: on a device the order of a scattered sum, and so a choice near its threshold, may vary.
        shifted = per_tile.gather(-1, key_tile.clamp(min=0).expand(per_tile.shape))
        return shifted.masked_fill(key_tile < 0, 0).sum(dim=-2)

    def tile_cells(self, device: torch.device, *, dense_last_rows: int = 0) -> Tensor:
        """Causal cells in each tile, int64 [Q, K], not counting those of the last `dense_last_rows` rows."""
        first, last = self.row_bounds(device, dense_last_rows=dense_last_rows)  # [Q]
        edges = torch.arange(self.num_diagonals + 1, device=device) * self.tile_tokens
        edges = (edges + self.start - self.num_past_tiles * self.tile_tokens).clamp(0, self.num_columns)
        rows = (last - first)[:, None]
        diagonal = self.diagonal(device)
        return torch.where(diagonal > 0, rows * edges.diff(), torch.where(diagonal == 0, rows * (rows + 1) // 2, 0))

    def row_bounds(self, device: torch.device, *, dense_last_rows: int) -> tuple[Tensor, Tensor]:
        """First and past-the-last row of each query tile, int64 [Q] each, with the last `dense_last_rows` rows cut off."""
        num_sparse = max(0, self.num_rows - dense_last_rows)
        first = torch.arange(self.num_query_tiles, device=device) * self.tile_tokens
        return first.clamp(max=num_sparse), (first + self.tile_tokens).clamp(max=num_sparse)


@dataclass(frozen=True, slots=True)
class LineSelection:
    """The lines that each head computes in one chunk. Where a column crosses a tile, it counts once."""

    tiles: Tensor  # bool [H, T], chosen tile-diagonals
    verticals: Tensor  # bool [H, N], chosen columns

    def with_dense_heads(self, dense: Tensor) -> "LineSelection":
        """The same selection, in which the heads marked in bool [H] read every tile and nothing else."""
        return LineSelection(self.tiles | dense[:, None], self.verticals & ~dense[:, None])

    def held_mass(self, mass: Tensor, grid: TileGrid) -> Tensor:
        """Weight of `mass` [H, Q, N] that the selection reads, [H]."""
        in_columns = grid.per_key_tile(mass.masked_fill(~self.verticals[:, None], 0.0))  # [H, Q, K]
        return torch.where(self._read_tiles(grid), grid.per_key_tile(mass), in_columns).sum(dim=(1, 2))

    def num_cells(self, grid: TileGrid, *, dense_last_rows: int) -> Tensor:
        """Exact number of causal cells that `sparse_prefill` reads for each head, int64 [H]."""
        device = self.tiles.device
        in_tiles = grid.tile_cells(device, dense_last_rows=dense_last_rows)  # [Q, K]
        in_columns = self._column_cells(grid, dense_last_rows=dense_last_rows)  # [H, Q, K]
        num_dense = min(dense_last_rows, grid.num_rows)
        in_dense_rows = num_dense * grid.num_columns - num_dense * (num_dense - 1) // 2
        return torch.where(self._read_tiles(grid), in_tiles, in_columns).sum(dim=(1, 2)) + in_dense_rows

    def _read_tiles(self, grid: TileGrid) -> Tensor:
        """Tiles on chosen diagonals, bool [H, Q, K]."""
        diagonal = grid.diagonal(self.tiles.device)
        return self.tiles[:, diagonal.clamp(min=0)] & (diagonal >= 0)

    def _column_cells(self, grid: TileGrid, *, dense_last_rows: int) -> Tensor:
        """Causal cells of the chosen columns in each tile, int64 [H, Q, K], without the last `dense_last_rows` rows."""
        device = self.verticals.device
        first, last = grid.row_bounds(device, dense_last_rows=dense_last_rows)  # [Q]
        diagonal = grid.diagonal(device)
        past = (
            grid.per_key_tile(self.verticals)[:, None] * (last - first)[:, None]
        )  # every row of a later tile reads it
        # In its own tile, a column is read by the rows from it on.
        own_row = torch.arange(grid.num_columns, device=device) - grid.start
        readers = (last[own_row.div(grid.tile_tokens, rounding_mode="floor").clamp(min=0)] - own_row).clamp(min=0)
        own = grid.per_key_tile(self.verticals * readers)[:, None]
        return torch.where(diagonal > 0, past, torch.where(diagonal == 0, own, 0))


def local_diagonals(grid: TileGrid, local_tokens: int, device: torch.device) -> Tensor:
    """Tile-diagonals on which some of the last `local_tokens` offsets lie, bool [T]; offset 0 is a row's own token."""
    reach = -(-(local_tokens - 1) // grid.tile_tokens) if local_tokens else -1
    return torch.arange(grid.num_diagonals, device=device) <= reach
