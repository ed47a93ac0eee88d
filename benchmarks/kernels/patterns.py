"""Fixed shapes of sparse attention, as data: which columns and which diagonals each head reads.

In the style of what arXiv 2407.02490 (MInference) and arXiv 2502.20766 (FlexPrefill) publish of Llama and Qwen heads: every head reads the
first columns and a band of the latest tokens, most read some columns from all rows (verticals) and some distances from all rows (slashes),
and how many of each differs widely between heads: some read little but the band, some nearly everything. The counts here are drawn, not
taken from either paper: a seed and a density give the same pattern on every machine, and tests hold its fingerprint.

A pattern is used in two ways, which are not the same. `masks` hands its lines to the kernel as they are: the density is what was asked for.
`plant` makes queries and keys whose real attention has this shape, and then the selection decides: it may choose fewer lines than are drawn
(a slash is heaviest in its middle) or more (planted weights have tails), so there the density that it computed is what counts.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.sparsity.grid import TileGrid

DENSITIES = (0.05, 0.10, 0.20, 0.50)  # of the causal cells that the kernel computes, after rounding to tiles
SINK_TOKENS = 30  # first columns that every head reads, as in arXiv 2407.02490
BAND_TOKENS = 100  # latest distances that every head reads, as in arXiv 2407.02490
_SLASHES_MAX = 5  # of one head; more would drown in each other's tails when they are planted
_SPREAD = 1.2  # of the logarithm of what a head reads, over heads
_NARROWEST_SLASH_TOKENS = 8
_PEAK = 12.0  # planted logit in the middle of a slash: above it tails grow faster than peaks, below it the context's many columns win
_FLAT_FROM = 0.125  # of the past as verticals: such a head is planted flat, as heads that read nearly everything are
_VERTICAL_WEIGHT = 1.0  # of all planted verticals together, against all slashes together
_SINK_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Slash:
    """Distances `first`, ..., `first + width - 1` between a row and the columns that it reads."""

    first: int
    width: int


@dataclass(frozen=True, slots=True)
class HeadPattern:
    """What one query head reads."""

    sinks: int  # first columns
    verticals: Tensor  # int64, columns of the past, ascending
    slashes: tuple[Slash, ...]  # the first is the band of latest tokens, from distance 0


@dataclass(frozen=True, slots=True)
class Pattern:
    """What all heads of a layer read in one chunk."""

    seed: int
    density: float  # asked for; what the tiles make of it is `computed_share`
    grid: TileGrid
    heads: tuple[HeadPattern, ...]

    def masks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The lines as `sparse_prefill` takes them: tiles bool [H, T], verticals bool [H, N]."""
        tiles = torch.zeros((len(self.heads), self.grid.num_diagonals), dtype=torch.bool)
        verticals = torch.zeros((len(self.heads), self.grid.num_columns), dtype=torch.bool)
        for index, head in enumerate(self.heads):
            for slash in head.slashes:
                # Row j of query tile q reads column j - d, which lies d // tt or one more tiles back.
                last = (slash.first + slash.width - 1 + self.grid.tile_tokens - 1) // self.grid.tile_tokens
                tiles[index, slash.first // self.grid.tile_tokens : last + 1] = True
            verticals[index, : head.sinks] = True
            verticals[index, head.verticals] = True
        return tiles.to(device), verticals.to(device)

    def fingerprint(self) -> str:
        """Of every line of every head."""
        digest = hashlib.sha256()
        for head in self.heads:
            digest.update(repr((head.sinks, head.slashes)).encode())
            digest.update(head.verticals.numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def make_pattern(*, seed: int, density: float, grid: TileGrid, num_heads: int, dense_last_rows: int) -> Pattern:
    """Draw every head's lines, then widen all slashes and add verticals in proportion until `density` of the cells is computed.

    Where the dense last rows and the band alone are more than that, it is these.
    """
    styles = [_Style.drawn(random.Random(f"{seed}:{head}"), grid) for head in range(num_heads)]
    low, high = 0.0, 1.0
    for _ in range(18):
        middle = (low + high) / 2
        pattern = Pattern(seed, density, grid, tuple(style.grown(middle, grid) for style in styles))
        share = computed_share(*pattern.masks(torch.device("cpu")), grid, dense_last_rows=dense_last_rows)
        low, high = (middle, high) if share < density else (low, middle)
    return Pattern(seed, density, grid, tuple(style.grown(low, grid) for style in styles))


@dataclass(frozen=True, slots=True)
class _Style:
    """How one head reads, before it is said how much."""

    greed: float  # what it reads, against other heads
    vertical_lean: float  # 0 to 1: verticals rather than slashes
    starts: tuple[int, ...]  # of its slashes, the band's 0 first
    columns: Tensor  # int64, of the past, in the order in which they become verticals

    @classmethod
    def drawn(cls, rng: random.Random, grid: TileGrid) -> _Style:
        num_slashes = rng.randint(0, _SLASHES_MAX - 1)
        reach = math.log(BAND_TOKENS), math.log(max(BAND_TOKENS + 1, grid.start - 1))
        starts = [int(math.exp(rng.uniform(*reach))) for _ in range(num_slashes)]  # near ones more often than far ones
        starts = [min(start, grid.num_columns - 1) for start in starts]
        greed, lean = math.exp(rng.gauss(0.0, _SPREAD)), rng.random()
        return cls(greed, lean, (0, *starts), _shuffled(grid.start, rng.randrange(1 << 31)))

    def grown(self, amount: float, grid: TileGrid) -> HeadPattern:
        """`amount` from 0 (the band and the sinks) to 1 (everything, or nearly)."""
        tokens = amount * self.greed * 8 * grid.num_columns  # read by a row
        of_slashes = tokens * (1 - self.vertical_lean)
        num_slashes = min(len(self.starts), 1 + int(of_slashes / _NARROWEST_SLASH_TOKENS))
        width = int(of_slashes / num_slashes)
        slashes = []
        for first in self.starts[:num_slashes]:
            least = BAND_TOKENS if first == 0 else _NARROWEST_SLASH_TOKENS
            slashes.append(Slash(first, min(grid.num_columns - first, max(least, width))))
        chosen = self.columns[: int(tokens * self.vertical_lean)]
        return HeadPattern(min(SINK_TOKENS, grid.start), chosen.sort().values, tuple(slashes))


def _shuffled(count: int, seed: int) -> Tensor:
    """0 to `count` - 1 in an order that depends on nothing but the seed: no generator promises that over versions."""
    mask = (1 << 31) - 1
    mixed = (torch.arange(count) * 2_654_435_761 + seed) & mask
    for factor in (1_103_515_245, 1_540_483_477):
        mixed = ((mixed ^ (mixed >> 13)) * factor) & mask
    return mixed.argsort(stable=True)


def computed_cells(tiles: Tensor, verticals: Tensor, grid: TileGrid, *, dense_last_rows: int) -> Tensor:
    """Causal cells that `sparse_prefill` reads for each head, a crossing once: tiles bool [H, T], verticals bool [H, N] -> int64 [H].

    Verticals are columns of the past, as in every pattern: all rows see them.
    """
    device, past = tiles.device, grid.num_past_tiles
    assert not verticals[:, grid.start :].any(), "verticals lie in the past"
    per_diagonal = grid.along_diagonals(grid.tile_cells(device, dense_last_rows=dense_last_rows))  # [T]
    cells = (tiles * per_diagonal).sum(dim=1)
    key_tile = grid.key_tile(torch.arange(grid.start, device=device)).expand(len(tiles), -1)
    listed = torch.zeros((len(tiles), past), dtype=torch.int64, device=device)
    listed.scatter_add_(1, key_tile, verticals[:, : grid.start].long())  # verticals in each past key tile
    first, last = grid.row_bounds(device, dense_last_rows=dense_last_rows)
    for query_tile, num_rows in enumerate((last - first).tolist()):
        # Key tile k of the past lies on diagonal query_tile + P - k.
        unread = ~tiles[:, query_tile + 1 : query_tile + past + 1].flip(1)  # [H, P]
        cells += num_rows * (listed * unread).sum(dim=1)
    num_dense = min(dense_last_rows, grid.num_rows)
    return cells + num_dense * grid.num_columns - num_dense * (num_dense - 1) // 2


def computed_share(tiles: Tensor, verticals: Tensor, grid: TileGrid, *, dense_last_rows: int) -> float:
    """The same of all heads together, as a share of dense attention's cells."""
    cells = computed_cells(tiles, verticals, grid, dense_last_rows=dense_last_rows)
    return int(cells.sum()) / (len(tiles) * grid.num_cells)


@dataclass(frozen=True, slots=True)
class Planted:
    """Queries and keys whose attention has a pattern's shape, at the scale 1 / sqrt(D)."""

    query: Tensor  # [r, H, D]
    key: Tensor  # [N, Hkv, D]


def plant(pattern: Pattern, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Planted:
    """Queries and keys of `dtype` whose softmax weight lies on the pattern's lines.

    Channels of a KV head, G query heads: G marks (a column that is a vertical of the group's head i has mark i, for which only head i
    asks), one mark of the sinks, and pairs that turn with the position as rotary embeddings do, each at a speed of its own. A query is a
    sum of such turning pairs, one for each of its slashes, turned back by the distance in its middle: there all pairs agree and the logit
    has a peak, elsewhere they cancel out but for a tail. The heads of a group share their keys: they have one width of slash, their mean,
    and a vertical of one of them is a hole in the slashes of the others.
    """
    grid, group = pattern.grid, len(pattern.heads) // num_kv_heads
    num_pairs = (head_dim - group - 1) // 2
    assert num_pairs > 0, "the head has channels left for slashes"
    scale = head_dim**-0.5
    query = torch.zeros((grid.num_rows, len(pattern.heads), head_dim), device=device)
    key = torch.zeros((grid.num_columns, num_kv_heads, head_dim), device=device)
    columns = torch.arange(grid.num_columns, dtype=torch.float64, device=device)
    rows = columns[grid.start :]
    pairs = slice(group + 1, group + 1 + 2 * num_pairs)
    amplitude = _PEAK / (scale * num_pairs)  # all pairs in step add up to _PEAK
    for kv_head in range(num_kv_heads):
        heads = pattern.heads[kv_head * group : (kv_head + 1) * group]
        widths = [slash.width for head in heads for slash in head.slashes]
        width = sum(widths) / len(widths)
        # At speeds up to this, the peak falls to exp(-2) of its height half a width from its middle.
        fastest = 4 * math.sqrt(3 / _PEAK) / width
        rng = random.Random(f"{pattern.seed}:{kv_head}:speeds")
        speeds = [rng.uniform(0.0, fastest) for _ in range(num_pairs)]
        turn = torch.tensor(speeds, dtype=torch.float64, device=device)
        key[:, kv_head, pairs] = _turned(columns, turn)
        for index, head in enumerate(heads):
            if len(head.verticals) > _FLAT_FROM * grid.start:
                continue  # zero queries: every column weighs the same
            row = query[:, kv_head * group + index]
            for slash in head.slashes:
                middle = 0.0 if slash.first == 0 else slash.first + (slash.width - 1) / 2
                row[:, pairs] += amplitude * _turned(rows - middle, turn)
            # Of all slashes, roughly: half their width is near the peak.
            log_weight = math.log(len(head.slashes) * width / 2) + _PEAK
            if len(head.verticals):
                marked = head.verticals.to(device)
                key[marked, kv_head, index] = 1.0
                # Or where it crosses a slash, a vertical would weigh more than all the others together.
                key[marked, kv_head, pairs] = 0.0
                row[:, index] = (log_weight + math.log(_VERTICAL_WEIGHT / len(marked))) / scale
            row[:, group] = (log_weight + math.log(_SINK_WEIGHT / max(1, head.sinks))) / scale
        key[: heads[0].sinks, kv_head] = 0.0
        key[: heads[0].sinks, kv_head, group] = 1.0
    return Planted(query.to(dtype), key.to(dtype))


def _turned(positions: Tensor, speeds: Tensor) -> Tensor:
    """Pairs of unit length turned by position times speed: positions [n], speeds [P], float64 -> float32 [n, 2 P]."""
    angle = positions[:, None] * speeds
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()
