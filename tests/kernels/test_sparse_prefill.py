"""`sparse_prefill` against a dense float64 softmax over the read mask of its contract, cell by cell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopserve.kernels import sparse_prefill
from tests.kernels import naive
from tests.kernels.conftest import Pool

# start, rows, tile: one token; no past; a past that fills no tile; odd everything; a tile larger than the chunk
SHAPES = [(0, 1, 4), (0, 23, 8), (3, 9, 8), (37, 21, 8), (40, 16, 8), (11, 5, 64)]


def num_diagonals(start: int, num_rows: int, tile_tokens: int) -> int:
    return -(-num_rows // tile_tokens) + -(-start // tile_tokens)


def read_mask(
    start: int, num_rows: int, tiles: Tensor, columns: Tensor, counts: Tensor, tile_tokens: int, dense_last_rows: int
):
    read = torch.zeros((len(tiles), num_rows, start + num_rows), dtype=torch.bool)
    for head in range(len(tiles)):
        verticals = set(columns[head, : counts[head]].tolist())
        for row in range(num_rows):
            for column in range(start + row + 1):
                tile = bool(tiles[head, row // tile_tokens - (column - start) // tile_tokens])
                read[head, row, column] = tile or column in verticals or row >= num_rows - dense_last_rows
    return read


def run(
    query: Tensor,
    pool: Pool,
    start: int,
    tiles: Tensor,
    columns: Tensor,
    counts: Tensor,
    tile_tokens: int,
    dense_last_rows: int,
):
    return sparse_prefill(
        query,
        pool.keys,
        pool.values,
        pool.slots,
        start=start,
        tiles=tiles,
        columns=columns,
        column_counts=counts,
        tile_tokens=tile_tokens,
        dense_last_rows=dense_last_rows,
        scale=0.6,
    )


@pytest.mark.parametrize(("start", "num_rows", "tile_tokens"), SHAPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("dense_last_rows", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_read_chosen_lines_and_nothing_else(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    start: int,
    num_rows: int,
    tile_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    dense_last_rows: int,
    dtype: torch.dtype,
):
    num_columns = start + num_rows
    pool = make_pool(num_columns, num_kv_heads, 8, dtype)
    query = random_query(num_rows, num_heads, 8, dtype, strided=True)
    tiles = torch.rand(num_heads, num_diagonals(start, num_rows, tile_tokens)) < 0.4
    columns = torch.rand(num_heads, num_columns).argsort(dim=1)[:, :6]
    counts = torch.randint(columns.shape[1] + 1, (num_heads,))
    counts[0] = 0
    read = read_mask(start, num_rows, tiles, columns, counts, tile_tokens, dense_last_rows)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, columns, counts, tile_tokens, dense_last_rows)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=naive.TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(("start", "num_rows", "tile_tokens"), SHAPES)
def test_all_tiles_are_dense_attention(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], start: int, num_rows: int, tile_tokens: int
):
    pool, query = make_pool(start + num_rows, 2, 8), random_query(num_rows, 4, 8)
    tiles = torch.ones((4, num_diagonals(start, num_rows, tile_tokens)), dtype=torch.bool)
    none = torch.zeros(4, dtype=torch.int64)
    read = naive.causal(start + torch.arange(num_rows), start + num_rows, 4)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, none[:, None][:, :0], none, tile_tokens, 0)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


def test_an_empty_selection_gives_zeros_and_reads_nothing(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]
):
    pool = make_pool(20, 2, 8)
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    none = torch.zeros(4, dtype=torch.int64)
    tiles = torch.zeros((4, num_diagonals(10, 10, 4)), dtype=torch.bool)
    output = run(random_query(10, 4, 8), pool, 10, tiles, none[:, None][:, :0], none, 4, 0)
    assert torch.equal(output, torch.zeros(10, 4, 8))


def test_cells_outside_the_lines_are_not_computed(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    """Columns on no chosen line are poisoned in one head's lines only: that head must not see them, a head that reads them must."""
    start, num_rows, tile_tokens = 16, 16, 4
    pool = make_pool(start + num_rows, 2, 8)
    tiles = torch.zeros((2, 8), dtype=torch.bool)
    tiles[:, 0] = True
    columns, counts = torch.tensor([[2, 5], [2, 9]]), torch.tensor([2, 2])
    unread = [c for c in range(start) if c not in (2, 5)]
    pool.keys[pool.slots[unread]] = torch.nan
    pool.values[pool.slots[unread]] = torch.nan
    output = run(random_query(num_rows, 2, 8), pool, start, tiles, columns, counts, tile_tokens, 0)
    assert output[:, 0].isfinite().all()
    assert output[:, 1].isnan().all()


def test_entries_past_a_heads_count_are_ignored_whatever_they_are(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]
):
    pool, query = make_pool(20, 1, 8), random_query(6, 2, 8)
    tiles, counts = torch.zeros((2, num_diagonals(14, 6, 4)), dtype=torch.bool), torch.tensor([1, 2])
    tiles[:, 0] = True
    clean = run(query, pool, 14, tiles, torch.tensor([[3, 3], [3, 8]]), counts, 4, 0)
    assert torch.equal(clean, run(query, pool, 14, tiles, torch.tensor([[3, 10**9], [3, 8]]), counts, 4, 0))
