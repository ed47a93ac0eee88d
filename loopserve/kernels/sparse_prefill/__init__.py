"""Contract of `sparse_prefill`: the new rows of one segment attend on chosen slash tiles and vertical columns only.

The grid of tiles is aligned to `start`, the position of row 0; tt = tile_tokens, P = ceil(start / tt) tiles lie in the past:

    key tiles      -P ... -1 | 0    1    2          column c is in key tile  floor((c - start) / tt)
    query tile 0    d4 d3 d2 | d0                   row j is in query tile   j // tt
    query tile 1    d5 d4 d3 | d1   d0              tile-diagonal t = query tile - key tile, 0 <= t < T
    query tile 2    d6 d5 d4 | d2   d1   d0         T = ceil(r / tt) + P      (drawn for P = 4, one past tile left out)
"""

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


def sparse_prefill(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    start: int,
    tiles: Tensor,
    verticals: Tensor,
    tile_tokens: int,
    dense_last_rows: int,
    scale: float,
) -> Tensor:
    """Attend row j of head h on the columns that its lines read; returns [r, H, D] in query's dtype.

    query [r, H, D], key_pool and value_pool [S, Hkv, D], all of one floating dtype; row j stands at position start + j; slots int64
    [N], N = start + r: where column c lies. tiles bool [H, T]: chosen tile-diagonals; verticals bool [H, N]: chosen columns. Row j of
    head h reads column c iff

        c <= start + j  and  (tiles[h, t(j, c)]  or  verticals[h, c]  or  j >= r - dense_last_rows)

    and reads it once, however many lines cross there. A row that reads nothing gives zeros. All tiles chosen is dense causal
    attention, to rounding. Softmax accumulates in float32. Mutates nothing. Source: phase 1 of arXiv 2507.13681; lines as in
    arXiv 2407.02490.
    """
    num_rows, num_heads, head_dim = query.shape
    num_diagonals = -(-num_rows // tile_tokens) - (-start // tile_tokens)
    assert key_pool.shape == value_pool.shape and key_pool.shape[2] == head_dim, "head dims differ"
    assert num_heads % key_pool.shape[1] == 0, "query heads are no multiple of KV heads"
    assert query.dtype == key_pool.dtype == value_pool.dtype, "query, keys and values differ in dtype"
    assert slots.dtype == torch.int64 and slots.shape == (start + num_rows,), "one int64 slot a column"
    assert tiles.dtype == torch.bool and tiles.shape == (num_heads, num_diagonals), "tiles are bool [H, T]"
    assert verticals.dtype == torch.bool and verticals.shape == (num_heads, start + num_rows), (
        "verticals are bool [H, N]"
    )
    assert dense_last_rows >= 0, "dense_last_rows is a count"
    output: Tensor = implementation("sparse_prefill", query.device.type)(
        query,
        key_pool,
        value_pool,
        slots,
        start=start,
        tiles=tiles,
        verticals=verticals,
        tile_tokens=tile_tokens,
        dense_last_rows=dense_last_rows,
        scale=scale,
    )
    return output
