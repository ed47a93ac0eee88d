"""`mass_per_tile` in Triton: a program a head, query tile and some key tiles reads its part of the mass once and writes both sums.

Bytes: 4 of each entry of the mass, and 4 of `less` a query tile, from L2 but for the first; in torch, the subtraction, the clamp, two
paddings and two sums read and write the mass nine times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.mass_per_tile import TileMass
from loopserve.kernels.tiles import tile_size

_ENTRIES = 2048  # of a program: 16 a thread of 4 warps, two of them in flight; by arithmetic, not measured


def mass_per_tile(mass: Tensor, less: Tensor | None, *, start: int, tile_tokens: int) -> TileMass:
    """See the contract in `loopserve.kernels.mass_per_tile`."""
    num_heads, num_query_tiles, num_columns = mass.shape
    num_key_tiles = num_query_tiles + -(-start // tile_tokens)
    assert mass.stride(2) == 1, "columns are contiguous"
    whole = torch.empty((num_heads, num_query_tiles, num_key_tiles), dtype=torch.float32, device=mass.device)
    added = whole if less is None else torch.empty_like(whole)
    if whole.numel() == 0:
        return TileMass(whole, added)
    in_tile = tile_size(tile_tokens, least=1)
    tiles = max(1, _ENTRIES // in_tile)
    _sum_tiles[(triton.cdiv(num_key_tiles, tiles), num_query_tiles, num_heads)](
        mass,
        mass if less is None else less.contiguous(),
        whole,
        added,
        num_columns,
        num_key_tiles,
        -start % tile_tokens,
        *mass.stride()[:2],
        HAS_LESS=less is not None,
        TILE=tile_tokens,
        IN_TILE=in_tile,
        TILES=tiles,
    )
    return TileMass(whole, added)


@triton.jit(do_not_specialize=["num_columns", "num_key_tiles", "front"])
def _sum_tiles(
    mass,
    less,
    whole,
    added,
    num_columns,
    num_key_tiles,
    front,
    mass_head,
    mass_row,
    HAS_LESS: tl.constexpr,
    TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    query_tile = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    key_tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    places = tl.arange(0, IN_TILE)
    columns = key_tiles[:, None] * TILE + places[None, :] - front
    inside = (places < TILE)[None, :] & (columns >= 0) & (columns < num_columns)
    entries = tl.load(mass + head * mass_head + query_tile * mass_row + columns, mask=inside, other=0.0)
    sums = (head * tl.num_programs(1) + query_tile) * num_key_tiles + key_tiles
    exists = key_tiles < num_key_tiles
    tl.store(whole + sums, tl.sum(entries, axis=1), mask=exists)
    if HAS_LESS:
        held = tl.load(less + head * num_columns + columns, mask=inside, other=0.0)
        tl.store(added + sums, tl.sum(tl.maximum(entries - held, 0.0), axis=1), mask=exists)
