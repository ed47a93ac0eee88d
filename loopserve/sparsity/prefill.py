"""Phase 1 of one segment in one layer: sample rows, choose lines, measure them on other rows, attend. Hop 8 of the turn.

Owns the order of these steps and the fallback to dense heads. Knows nothing about how a method chooses (`lines.py`, `a_shape.py`) nor
about models and sessions. The host queues a layer and never waits for it: what the lines came to is known to the device alone, and what
the layers of a chunk have in common is copied there once. Source: phase 1 of arXiv 2507.13681.
"""

import functools
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from loopserve.config import PrefillSparsity
from loopserve.kernels import line_scores, sparse_prefill
from loopserve.plan import SparsePrefill
from loopserve.sparsity.grid import CHUNKS_KEPT, LineSelection, TileGrid
from loopserve.sparsity.rows import sample_rows
from loopserve.transfer import on_device


class Mass(Enum):
    """How a method wants the sampled rows' dense weights."""

    NONE = "none"  # its choice does not depend on them: no rows are scored for it
    PER_TILE = "per tile"  # summed per query tile
    PER_ROW = "per row"  # as they are; it samples the last rows only


class PrefillMethod(Protocol):
    """A way to choose lines; stateless, and without waiting for the device: a choice is made of tensors whose shapes it does not decide."""

    @property
    def mass(self) -> Mass:
        """What its choice is made from."""

    def settings(self, config: PrefillSparsity) -> PrefillSparsity:
        """The settings as this method has them: which rows it samples, which lines it always keeps."""

    def choose(
        self, mass: Tensor, *, start: int, num_rows: int, alpha: float, config: PrefillSparsity
    ) -> LineSelection:
        """Lines of each head from `mass`, float32 [H, Q, N] (a row a query tile) or [H, R, N] (the last R rows), see `Mass`.

        The chunk's `num_rows` rows begin at position `start`; N = start + num_rows. `alpha` (0 to 1] is the share of the sampled
        weight to hold; 1.0 chooses every tile. `config` is what `settings` gave.
        """


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What one segment computed in one layer. Tensors stay on the device; nothing here waits for it."""

    output: Tensor  # [r, H, D]
    coverage: Tensor | None  # float32 [H], dense weight held by the attention that ran; None: the chunk held no row out
    cells_computed: Tensor  # int64 scalar, causal cells read, summed over heads
    cells_total: int  # causal cells of dense attention, summed over heads
    dense_heads: Tensor  # int64 scalar, heads that fell back to dense


def attend(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    start: int,
    order: SparsePrefill,
    config: PrefillSparsity,
    method: PrefillMethod,
    scale: float,
) -> PrefillOutcome:
    """Attend the new rows of one segment on the lines that `method` chooses for each head.

    query [r, H, D]; pools [S, Hkv, D]; slots int64 [N], N = start + r, with the new tokens already stored. A head whose lines would
    compute more than `config.dense_head_share` of its causal cells, or whose held-out coverage is under `order.min_coverage`, is
    computed dense and counted; its coverage is then 1. A held-out row among the chunk's dense last rows counts as covered,
    because it is. Mutates nothing.
    """
    config = method.settings(config)
    grid = TileGrid(start, query.shape[0], config.tile_tokens)
    sample = _sample(grid, config, method.mass, order.seed, query.device)
    chosen_by, measured_by = _sampled_mass(query, key_pool, slots, sample, scale=scale)
    selection = method.choose(chosen_by, start=start, num_rows=grid.num_rows, alpha=order.alpha, config=config)
    cells = selection.num_cells(grid, dense_last_rows=config.dense_last_rows)
    dense = cells > config.dense_head_share * grid.num_cells
    coverage = None
    if sample.num_heldout:
        coverage = (selection.held_mass(measured_by, grid) + sample.num_read_densely) / sample.num_heldout
        if order.min_coverage is not None:
            dense = dense | (coverage < order.min_coverage)
        coverage = coverage.masked_fill(dense, 1.0).clamp(max=1.0)
    selection = selection.with_dense_heads(dense)
    output = sparse_prefill(
        query,
        key_pool,
        value_pool,
        slots,
        start=start,
        tiles=selection.tiles,
        verticals=selection.verticals,
        tile_tokens=config.tile_tokens,
        dense_last_rows=config.dense_last_rows,
        scale=scale,
    )
    return PrefillOutcome(
        output=output,
        coverage=coverage,
        cells_computed=cells.masked_fill(dense, grid.num_cells).sum(),
        cells_total=grid.num_cells * query.shape[1],
        dense_heads=dense.sum(),
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """The rows of a chunk that are scored: first those that choose, in their groups, then those that measure, a group a query tile."""

    rows: Tensor  # int64 [R], in the chunk
    positions: Tensor  # int64 [R]
    groups: Tensor  # int64 [R]
    num_choosing_groups: int
    num_groups: int
    num_heldout: int  # those that are among the chunk's dense last rows included, ...
    num_read_densely: int  # ... which need not be scored


@functools.lru_cache(maxsize=CHUNKS_KEPT)
def _sample(grid: TileGrid, config: PrefillSparsity, mass: Mass, seed: int, device: torch.device) -> _Sample:
    """Drawn and copied to the device once for all layers of a chunk."""
    drawn = sample_rows(grid.num_rows, config, seed)
    select = () if mass is Mass.NONE else drawn.select
    heldout = [row for row in drawn.heldout if row < grid.num_rows - config.dense_last_rows]
    per_row = mass is Mass.PER_ROW
    num_choosing = len(select) if per_row else grid.num_query_tiles
    groups = list(range(num_choosing)) if per_row else [row // grid.tile_tokens for row in select]
    groups += [num_choosing + row // grid.tile_tokens for row in heldout]
    rows = [*select, *heldout]
    numbers = on_device([rows, [grid.start + row for row in rows], groups], device, dtype=torch.int64)
    return _Sample(
        rows=numbers[0],
        positions=numbers[1],
        groups=numbers[2],
        num_choosing_groups=num_choosing,
        num_groups=num_choosing + grid.num_query_tiles,
        num_heldout=len(drawn.heldout),
        num_read_densely=len(drawn.heldout) - len(heldout),
    )


def _sampled_mass(
    query: Tensor, key_pool: Tensor, slots: Tensor, sample: _Sample, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense weights of the choosing rows, as the method wants them, and of the measuring rows, [H, Q, N], in one pass over the keys."""
    mass = line_scores(
        query.index_select(0, sample.rows),
        key_pool,
        slots,
        sample.positions,
        groups=sample.groups,
        num_groups=sample.num_groups,
        scale=scale,
    )
    return mass[:, : sample.num_choosing_groups], mass[:, sample.num_choosing_groups :]
