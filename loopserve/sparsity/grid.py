"""The lines of one chunk as data: the grid of tiles they lie on, and a selection with its exact size and the weight it holds.

The grid is aligned to the chunk's first row and is drawn in `loopserve.kernels.sparse_prefill`. Here key tiles count from 0
at the oldest, so that tile-diagonal t of query tile q is key tile q + P - t. What a grid alone decides is made once a chunk and kept
for its other layers, which would else launch it anew; nobody may change it. Nothing here waits for the device. Knows nothing about how
lines are chosen.

Letters: H query heads, Q query tiles, K key tiles, P past key tiles (K = P + Q), T tile-diagonals (T = K), N columns, r rows.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels import mass_outside_tiles

CHUNKS_KEPT = (
    32  # all chunks of a step go through one layer before the next: as many as a step has by default, a turn each
)


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

    @property
    def cut_tokens(self) -> int:
        """Tokens that the oldest key tile lacks."""
        return self.num_past_tiles * self.tile_tokens - self.start

    def key_tile(self, columns: Tensor) -> Tensor:
        """Key tile of each column, in [0, K); int64, shaped as `columns`."""
        return (columns - self.start).div(self.tile_tokens, rounding_mode="floor") + self.num_past_tiles

    def per_key_tile(self, per_column: Tensor) -> Tensor:
        """Sum [..., N] inside each key tile: [..., K]."""
        back = self.num_query_tiles * self.tile_tokens - self.num_rows
        padded = pad(per_column, (self.cut_tokens, back))
        return padded.view(*per_column.shape[:-1], self.num_diagonals, self.tile_tokens).sum(dim=-1)

    def along_diagonals(self, per_tile: Tensor) -> Tensor:
        """Sum [..., Q, K] over the tiles of each tile-diagonal: [..., T]."""
        # Key tile and tile-diagonal add up to q + P, so that either is found from the other by the same table.
        key_tile, exists = _diagonals(self, per_tile.device)
        # Gathered, not scattered: on a device the order of a scattered sum, and so a choice near its threshold, may vary.
        return (per_tile.gather(-1, key_tile.expand(per_tile.shape)) * exists).sum(dim=-2)

    def along_tiles(self, per_diagonal: Tensor) -> Tensor:
        """The tile-diagonal of bool [H, T] that each tile lies on, bool [H, Q, K]; False in the future."""
        diagonal, causal = _diagonals(self, per_diagonal.device)
        return per_diagonal[:, diagonal] & causal

    def tile_cells(self, device: torch.device, *, dense_last_rows: int = 0) -> Tensor:
        """Causal cells in each tile, int64 [Q, K], not counting those of the last `dense_last_rows` rows."""
        return _cells(self, dense_last_rows, device).of_tiles

    def row_bounds(self, device: torch.device, *, dense_last_rows: int) -> tuple[Tensor, Tensor]:
        """First and past-the-last row of each query tile, int64 [Q] each, with the last `dense_last_rows` rows cut off."""
        num_sparse = max(0, self.num_rows - dense_last_rows)
        first = torch.arange(self.num_query_tiles, device=device) * self.tile_tokens
        return first.clamp(max=num_sparse), (first + self.tile_tokens).clamp(max=num_sparse)

    def diagonal_cells(self, device: torch.device) -> Tensor:
        """Causal cells on each tile-diagonal, int64 [T]."""
        return _diagonal_cells(self, device)


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
        inside, outside = mass_outside_tiles(mass, self.tiles, start=grid.start, tile_tokens=grid.tile_tokens)
        return inside + (outside * self.verticals).sum(dim=1)

    def num_cells(self, grid: TileGrid, *, dense_last_rows: int) -> Tensor:
        """Exact number of causal cells that `sparse_prefill` reads for each head, int64 [H]."""
        cells = _cells(grid, dense_last_rows, self.tiles.device)
        chosen = grid.per_key_tile(self.verticals)[:, None]  # [H, 1, K]
        # A column is read by every row of a query tile after its own, and by the rows of its own tile from itself on.
        in_tiles = torch.where(grid.along_tiles(self.tiles), cells.of_tiles, chosen * cells.past_rows).sum(dim=(1, 2))
        in_own_tile = (self.verticals[:, grid.start :] * cells.own_rows).sum(dim=1).masked_fill(self.tiles[:, 0], 0)
        return in_tiles + in_own_tile + cells.in_dense_rows


@dataclass(frozen=True, slots=True)
class _Cells:
    """Causal cells of a grid whose last rows are read densely; those are counted apart."""

    of_tiles: Tensor  # int64 [Q, K], of each tile
    past_rows: Tensor  # int64 [Q, K], of one column where its key tile lies before the query tile; 0 elsewhere
    own_rows: Tensor  # int64 [r], of the column of each new row in its own query tile
    in_dense_rows: int


@functools.lru_cache(maxsize=CHUNKS_KEPT)
def local_diagonals(grid: TileGrid, local_tokens: int, device: torch.device) -> Tensor:
    """Tile-diagonals on which some of the last `local_tokens` offsets lie, bool [T]; offset 0 is a row's own token."""
    reach = -(-(local_tokens - 1) // grid.tile_tokens) if local_tokens else -1
    return torch.arange(grid.num_diagonals, device=device) <= reach


@functools.lru_cache(maxsize=CHUNKS_KEPT)
def _diagonals(grid: TileGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tile-diagonal of every (query tile, key tile), int64 [Q, K], and where there is one, bool [Q, K]: not in the future."""
    query_tile = torch.arange(grid.num_query_tiles, device=device)[:, None]
    diagonal = query_tile + grid.num_past_tiles - torch.arange(grid.num_diagonals, device=device)
    return diagonal.clamp(min=0), diagonal >= 0


@functools.lru_cache(maxsize=CHUNKS_KEPT)
def _diagonal_cells(grid: TileGrid, device: torch.device) -> Tensor:
    return grid.along_diagonals(grid.tile_cells(device))


@functools.lru_cache(maxsize=2 * CHUNKS_KEPT)  # a chunk's cells are counted with dense rows apart, and without any
def _cells(grid: TileGrid, dense_last_rows: int, device: torch.device) -> _Cells:
    first, last = grid.row_bounds(device, dense_last_rows=dense_last_rows)
    rows = (last - first)[:, None]  # [Q, 1]
    diagonal, causal = _diagonals(grid, device)
    past_rows = rows * (diagonal > 0)
    widths = grid.per_key_tile(torch.ones(grid.num_columns, dtype=torch.int64, device=device))  # [K]
    own = causal & (diagonal == 0)
    own_row = torch.arange(grid.num_rows, device=device)
    num_dense = min(dense_last_rows, grid.num_rows)
    return _Cells(
        of_tiles=past_rows * widths + own * (rows * (rows + 1) // 2),
        past_rows=past_rows,
        own_rows=(last[own_row // grid.tile_tokens] - own_row).clamp(min=0),
        in_dense_rows=num_dense * grid.num_columns - num_dense * (num_dense - 1) // 2,
    )
