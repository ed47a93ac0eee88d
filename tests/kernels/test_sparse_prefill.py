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


def read_mask(start: int, num_rows: int, tiles: Tensor, verticals: Tensor, tile_tokens: int, dense_last_rows: int):
    """The contract's condition, bool [H, r, N]."""
    row, column = torch.arange(num_rows)[:, None], torch.arange(start + num_rows)
    diagonal = row // tile_tokens - (column - start).div(
        tile_tokens, rounding_mode="floor"
    )  # [r, N]; negative in the future
    in_tiles = tiles[:, diagonal.clamp(min=0)]
    return (column <= start + row) & (in_tiles | verticals[:, None] | (row >= num_rows - dense_last_rows))


def run(
    query: Tensor, pool: Pool, start: int, tiles: Tensor, verticals: Tensor, tile_tokens: int, dense_last_rows: int
):
    return sparse_prefill(
        query,
        pool.keys,
        pool.values,
        pool.slots,
        start=start,
        tiles=tiles,
        verticals=verticals,
        tile_tokens=tile_tokens,
        dense_last_rows=dense_last_rows,
        scale=0.6,
    )


def columns_of(num_columns: int, *listed: list[int]) -> Tensor:
    """Verticals bool [H, N] from the columns of each head."""
    verticals = torch.zeros((len(listed), num_columns), dtype=torch.bool)
    for head, columns in enumerate(listed):
        verticals[head, columns] = True
    return verticals


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
    verticals = torch.rand(num_heads, num_columns) < 0.2
    verticals[0] = False
    read = read_mask(start, num_rows, tiles, verticals, tile_tokens, dense_last_rows)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, verticals, tile_tokens, dense_last_rows)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=naive.TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(("start", "num_rows", "tile_tokens"), SHAPES)
def test_all_tiles_are_dense_attention(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], start: int, num_rows: int, tile_tokens: int
):
    pool, query = make_pool(start + num_rows, 2, 8), random_query(num_rows, 4, 8)
    tiles = torch.ones((4, num_diagonals(start, num_rows, tile_tokens)), dtype=torch.bool)
    none = torch.zeros((4, start + num_rows), dtype=torch.bool)
    read = naive.causal(start + torch.arange(num_rows), start + num_rows, 4)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, none, tile_tokens, 0)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


def test_an_empty_selection_gives_zeros_and_reads_nothing(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]
):
    pool = make_pool(20, 2, 8)
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    none = torch.zeros((4, 20), dtype=torch.bool)
    tiles = torch.zeros((4, num_diagonals(10, 10, 4)), dtype=torch.bool)
    output = run(random_query(10, 4, 8), pool, 10, tiles, none, 4, 0)
    assert torch.equal(output, torch.zeros(10, 4, 8))


def test_cells_outside_the_lines_are_not_computed(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    """Columns on no chosen line are poisoned in one head's lines only: that head must not see them, a head that reads them must."""
    start, num_rows, tile_tokens = 16, 16, 4
    pool = make_pool(start + num_rows, 2, 8)
    tiles = torch.zeros((2, 8), dtype=torch.bool)
    tiles[:, 0] = True
    verticals = columns_of(start + num_rows, [2, 5], [2, 9])
    unread = [c for c in range(start) if c not in (2, 5)]
    pool.keys[pool.slots[unread]] = torch.nan
    pool.values[pool.slots[unread]] = torch.nan
    output = run(random_query(num_rows, 2, 8), pool, start, tiles, verticals, tile_tokens, 0)
    assert output[:, 0].isfinite().all()
    assert output[:, 1].isnan().all()


def long_pool(num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Pool:
    """Contexts of more tokens than `make_pool` holds, one slot in two poisoned; pools of one head's slots after the other's."""
    slots = torch.randperm(2 * num_tokens)[:num_tokens]
    pools = [torch.full((num_kv_heads, 2 * num_tokens, head_dim), torch.nan, dtype=dtype).transpose(0, 1) for _ in "kv"]
    for pool in pools:
        pool[slots] = torch.randn((num_tokens, num_kv_heads, head_dim)).to(dtype)
    return Pool(*pools, slots)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(8, 1, 64), (7, 1, 128), (6, 2, 256), (5, 1, 80), (6, 1, 24), (3, 1, 1), (4, 2, 17), (2, 2, 96)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_head_dim_and_group_size(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
):
    start, num_rows, tile_tokens = 21, 11, 8
    pool = make_pool(start + num_rows, num_kv_heads, head_dim, dtype)
    query = random_query(num_rows, num_heads, head_dim, dtype) * head_dim**-0.5
    tiles = torch.rand(num_heads, num_diagonals(start, num_rows, tile_tokens)) < 0.4
    verticals = torch.rand(num_heads, start + num_rows) < 0.2
    read = read_mask(start, num_rows, tiles, verticals, tile_tokens, 3)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, verticals, tile_tokens, 3)
    torch.testing.assert_close(output.double(), expected, atol=naive.TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_reads_everything_stands_beside_one_that_reads_nothing(dtype: torch.dtype):
    """Long enough for lists that are split, and for some that are not."""
    start, num_rows, tile_tokens = 1205, 19, 16
    pool = long_pool(start + num_rows, 1, 16, dtype)
    query = torch.randn((num_rows, 5, 16)).to(dtype)
    tiles = torch.zeros((5, num_diagonals(start, num_rows, tile_tokens)), dtype=torch.bool)
    verticals = torch.zeros((5, start + num_rows), dtype=torch.bool)
    tiles[0] = True
    verticals[2] = True
    tiles[3] = torch.rand(tiles.shape[1]) < 0.5
    verticals[3] = torch.rand(verticals.shape[1]) < 0.5
    tiles[4, 0], verticals[4, :3] = True, True
    read = read_mask(start, num_rows, tiles, verticals, tile_tokens, 0)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, verticals, tile_tokens, 0)
    assert torch.equal(output[:, 1], torch.zeros_like(output[:, 1]))
    torch.testing.assert_close(output.double(), expected, atol=naive.TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "num_rows"), [(4, 2, 3), (6, 1, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_last_rows_read_a_long_context(num_heads: int, num_kv_heads: int, num_rows: int, dtype: torch.dtype):
    start = 2101
    pool = long_pool(start + num_rows, num_kv_heads, 16, dtype)
    query = torch.randn((num_rows, num_heads, 16)).to(dtype)
    tiles = torch.zeros((num_heads, num_diagonals(start, num_rows, 64)), dtype=torch.bool)
    verticals = torch.zeros((num_heads, start + num_rows), dtype=torch.bool)
    read = naive.causal(start + torch.arange(num_rows), start + num_rows, num_heads)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, verticals, 64, num_rows + 2)
    torch.testing.assert_close(output.double(), expected, atol=naive.TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_may_be_larger_than_a_block(make_pool: Callable[..., Pool], dtype: torch.dtype):
    start, num_rows, tile_tokens = 130, 210, 150
    pool, query = make_pool(start + num_rows, 1, 8, dtype), torch.randn((num_rows, 2, 8)).to(dtype)
    tiles = torch.tensor([[True, False, True], [False, True, False]])
    verticals = columns_of(start + num_rows, [0, 129, 131, 333], [7])
    read = read_mask(start, num_rows, tiles, verticals, tile_tokens, 15)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, verticals, tile_tokens, 15)
    torch.testing.assert_close(output.double(), expected, atol=naive.TOLERANCE[dtype], rtol=0)


def test_lines_are_found_wherever_they_lie_in_a_long_context():
    """More lines than are counted at a time, few of them chosen, with the first and the last of both kinds."""
    start, num_rows, tile_tokens = 9001, 5, 4
    pool, query = long_pool(start + num_rows, 1, 4, torch.float32), torch.randn((num_rows, 2, 4))
    tiles = torch.rand(2, num_diagonals(start, num_rows, tile_tokens)) < 0.02
    verticals = torch.rand(2, start + num_rows) < 0.02
    for chosen in (tiles, verticals):
        chosen[1, 0] = chosen[1, -1] = True
    read = read_mask(start, num_rows, tiles, verticals, tile_tokens, 0)
    expected = naive.attention(query, pool.keys[pool.slots], pool.values[pool.slots], read, 0.6)
    output = run(query, pool, start, tiles, verticals, tile_tokens, 0)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dense_last_rows", [0, 2])
def test_a_broken_query_shows_in_its_own_row_if_that_reads(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], dense_last_rows: int
):
    pool, query = make_pool(30, 1, 8), random_query(10, 2, 8)
    query[[1, 5, 9]] = torch.nan
    tiles = torch.zeros((2, num_diagonals(20, 10, 4)), dtype=torch.bool)
    verticals = columns_of(30, [24, 25], [])
    output = run(query, pool, 20, tiles, verticals, 4, dense_last_rows)
    broken = output.isnan()
    assert torch.equal(broken.any(dim=2), broken.all(dim=2))
    assert broken[:, 0, 0].nonzero()[:, 0].tolist() == [5, 9]  # row 1 comes before both columns
    assert broken[:, 1, 0].nonzero()[:, 0].tolist() == ([9] if dense_last_rows else [])
    assert torch.equal(output[1], torch.zeros(2, 8))


def test_slots_past_2_to_the_31_elements_are_reached():
    """The pools share 4 GiB of address space; only the pages of five slots are ever touched."""
    num_slots = 2**31 // 32 + 64
    both = torch.empty((num_slots, 1, 32), dtype=torch.bfloat16)
    slots = torch.tensor([num_slots - 1, 3, num_slots - 40, 2**30 // 32 + 2, 77])
    near = torch.randn((5, 1, 32)).to(torch.bfloat16)
    both[slots] = near
    query, start, tiles = torch.randn((3, 2, 16)).to(torch.bfloat16), 2, torch.tensor([[True, False], [False, True]])
    verticals = columns_of(5, [], [3])
    far = run(query, Pool(both[:, :, :16], both[:, :, 16:], slots), start, tiles, verticals, 4, 1)
    here = run(query, Pool(near[:, :, :16], near[:, :, 16:], torch.arange(5)), start, tiles, verticals, 4, 1)
    assert torch.equal(far, here)
