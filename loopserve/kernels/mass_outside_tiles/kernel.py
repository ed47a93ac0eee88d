"""`mass_outside_tiles` in Triton: a program a head and block of columns goes through the query tiles and keeps both sums in registers.

Bytes: 4 of each entry of the mass, read once; a byte of `tiles` an entry, from L1 and L2, as neighbouring columns share their tile; 4 a
column written. What chosen tiles hold is summed a block first and over the blocks afterwards, so that no sum depends on who comes first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.mass_outside_tiles import SplitMass

_BLOCK = (
    1024  # columns: 8 a thread of 4 warps. 64 Ki columns of 32 heads are 2,048 programs; by arithmetic, not measured
)


def mass_outside_tiles(mass: Tensor, tiles: Tensor, *, start: int, tile_tokens: int) -> SplitMass:
    """See the contract in `loopserve.kernels.mass_outside_tiles`."""
    num_heads, num_query_tiles, num_columns = mass.shape
    assert mass.stride(2) == 1, "columns are contiguous"
    num_blocks = triton.cdiv(num_columns, _BLOCK)
    outside = torch.empty((num_heads, num_columns), dtype=torch.float32, device=mass.device)
    inside = torch.zeros((num_heads, num_blocks), dtype=torch.float32, device=mass.device)
    if outside.numel() > 0:
        _split_columns[(num_blocks, num_heads)](
            mass,
            tiles.contiguous().view(torch.uint8),
            inside,
            outside,
            num_query_tiles,
            num_columns,
            tiles.shape[1],
            start,
            *mass.stride()[:2],
            TILE=tile_tokens,
            BLOCK=_BLOCK,
        )
    return SplitMass(inside.sum(dim=1), outside)


@triton.jit(do_not_specialize=["num_query_tiles", "num_columns", "num_diagonals", "start"])
def _split_columns(
    mass,
    tiles,
    inside,
    outside,
    num_query_tiles,
    num_columns,
    num_diagonals,
    start,
    mass_head,
    mass_row,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    exists = columns < num_columns
    num_past_tiles = tl.cdiv(start, TILE)
    key_tiles = (columns + num_past_tiles * TILE - start) // TILE  # counted from the oldest
    held = tl.zeros((BLOCK,), tl.float32)
    left = tl.zeros((BLOCK,), tl.float32)
    of_tile = mass + head * mass_head
    for query_tile in range(0, num_query_tiles):
        entries = tl.load(of_tile + columns, mask=exists, other=0.0)
        of_tile += mass_row
        diagonals = query_tile + num_past_tiles - key_tiles  # negative in the future, where nothing weighs
        chosen = tl.load(tiles + head * num_diagonals + diagonals, mask=exists & (diagonals >= 0), other=0)
        held += tl.where(chosen != 0, entries, 0.0)
        left += tl.where(chosen != 0, 0.0, entries)
    tl.store(outside + head * num_columns + columns, left, mask=exists)
    tl.store(inside + head * tl.num_programs(0) + block, tl.sum(held, axis=0))
