"""`line_scores` and `token_scores` against a dense float64 softmax."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopserve.kernels import line_scores, token_scores
from tests.kernels import naive
from tests.kernels.conftest import Pool

SHAPES = [(1, 1, 1, 1), (1, 33, 4, 4), (5, 17, 4, 2), (9, 64, 8, 2)]  # rows, columns, query heads, KV heads


@pytest.mark.parametrize(("num_rows", "num_columns", "num_heads", "num_kv_heads"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_scores_are_dense_causal_weights(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_rows: int,
    num_columns: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    strided: bool,
):
    pool = make_pool(num_columns, num_kv_heads, 6, dtype)
    query = random_query(num_rows, num_heads, 6, dtype, strided=strided)
    positions = torch.randint(num_columns, (num_rows,))
    groups = torch.randint(3, (num_rows,))
    dense = naive.weights(query, pool.keys[pool.slots], naive.causal(positions, num_columns, num_heads), 0.4)
    by_group = torch.stack([dense[:, groups == g].sum(dim=1) for g in range(3)], dim=1)
    # Inputs are given, products and sums are float32 in either case: bfloat16 needs no wider tolerance here.
    lines = line_scores(query, pool.keys, pool.slots, positions, groups=groups, num_groups=3, scale=0.4)
    assert lines.dtype == torch.float32
    torch.testing.assert_close(lines.double(), by_group, atol=1e-5, rtol=0)
    tokens = token_scores(query, pool.keys, pool.slots, positions, scale=0.4)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.double(), dense.sum(dim=1), atol=1e-5, rtol=0)


def test_a_row_adds_one_to_its_group_and_nothing_to_its_future(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]
):
    pool = make_pool(40, 2, 8)
    positions = torch.tensor([0, 7, 39])
    lines = line_scores(
        random_query(3, 4, 8), pool.keys, pool.slots, positions, groups=torch.tensor([2, 0, 3]), num_groups=5, scale=1.0
    )
    torch.testing.assert_close(lines.sum(dim=2), torch.tensor([1.0, 0, 1, 1, 0]).expand(4, 5))
    assert (lines[:, 2, 1:] == 0).all()
    assert (lines[:, 0, 8:] == 0).all()


def test_no_rows_score_zero(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    pool, none = make_pool(4, 2, 8), torch.zeros(0, dtype=torch.int64)
    lines = line_scores(random_query(0, 2, 8), pool.keys, pool.slots, none, groups=none, num_groups=2, scale=1.0)
    assert torch.equal(lines, torch.zeros(2, 2, 4))
    assert torch.equal(token_scores(random_query(0, 2, 8), pool.keys, pool.slots, none, scale=1.0), torch.zeros(2, 4))


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
    pool, query = make_pool(40, num_kv_heads, head_dim, dtype), random_query(3, num_heads, head_dim, dtype)
    positions, groups, scale = torch.tensor([39, 0, 12]), torch.tensor([1, 0, 1]), head_dim**-0.5
    dense = naive.weights(query, pool.keys[pool.slots], naive.causal(positions, 40, num_heads), scale)
    by_group = torch.stack([dense[:, 1], dense[:, 0] + dense[:, 2]], dim=1)
    lines = line_scores(query, pool.keys, pool.slots, positions, groups=groups, num_groups=2, scale=scale)
    torch.testing.assert_close(lines.double(), by_group, atol=1e-5, rtol=0)
    tokens = token_scores(query, pool.keys, pool.slots, positions, scale=scale)
    torch.testing.assert_close(tokens.double(), dense.sum(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_groups", [1, 20, 90])
def test_many_rows_and_groups_over_many_columns(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], dtype: torch.dtype, num_groups: int
):
    """Rows, groups and columns that fill no whole number of tiles; groups without rows, and one with more rows than a tile has."""
    num_rows, num_columns = 75, 300
    pool, query = make_pool(num_columns, 1, 16, dtype), random_query(num_rows, 2, 16, dtype)
    positions = torch.randint(num_columns, (num_rows,))
    positions[:20] = torch.randint(60, (20,))
    groups = torch.randint(num_groups, (num_rows,))
    groups[30:] = num_groups // 2
    dense = naive.weights(query, pool.keys[pool.slots], naive.causal(positions, num_columns, 2), 0.25)
    by_group = torch.stack([dense[:, groups == g].sum(dim=1) for g in range(num_groups)], dim=1)
    lines = line_scores(query, pool.keys, pool.slots, positions, groups=groups, num_groups=num_groups, scale=0.25)
    # Some 50 weights of up to 1 meet in one cell: float32 rounds their sum by up to 50 * 2**-24 of it a step.
    torch.testing.assert_close(lines.double(), by_group, atol=1e-5, rtol=1e-5)
    tokens = token_scores(query, pool.keys, pool.slots, positions, scale=0.25)
    torch.testing.assert_close(tokens.double(), dense.sum(dim=1), atol=1e-5, rtol=1e-5)


def test_a_column_in_every_rows_future_may_hold_anything(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]
):
    pool, positions = make_pool(200, 1, 8), torch.tensor([3, 150])
    pool.keys[pool.slots[151:]] = torch.nan
    lines = line_scores(
        random_query(2, 2, 8), pool.keys, pool.slots, positions, groups=positions // 150, num_groups=2, scale=1.0
    )
    torch.testing.assert_close(lines.sum(dim=2), torch.ones(2, 2))
    assert (lines[:, :, 151:] == 0).all()


def test_a_broken_row_spoils_its_group_alone(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    pool, query = make_pool(50, 1, 8), random_query(4, 2, 8)
    query[2, 1] = torch.nan
    positions, groups = torch.tensor([49, 20, 30, 40]), torch.tensor([0, 1, 1, 2])
    lines = line_scores(query, pool.keys, pool.slots, positions, groups=groups, num_groups=4, scale=1.0)
    assert lines[1, 1].isnan().all()
    assert lines[0].isfinite().all()
    assert lines[1, [0, 2, 3]].isfinite().all()
    tokens = token_scores(query, pool.keys, pool.slots, positions, scale=1.0)
    assert tokens[1].isnan().all()
    assert tokens[0].isfinite().all()


def test_strides_are_free_but_for_the_last(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    pool, query = make_pool(60, 2, 8), random_query(3, 4, 8)
    positions, groups = torch.tensor([5, 59, 31]), torch.tensor([1, 0, 1])
    by_head = pool.keys.transpose(0, 1).contiguous().transpose(0, 1)
    slots, at, of = (torch.stack([t, t + 1], dim=1).flatten()[::2] for t in (pool.slots, positions, groups))
    plain = line_scores(query, pool.keys, pool.slots, positions, groups=groups, num_groups=2, scale=1.0)
    strided = line_scores(query, by_head, slots, at, groups=of, num_groups=2, scale=1.0)
    torch.testing.assert_close(strided, plain)
    tokens = token_scores(query, by_head, slots, at, scale=1.0)
    torch.testing.assert_close(tokens, token_scores(query, pool.keys, pool.slots, positions, scale=1.0))


def test_slots_past_2_to_the_31_elements_are_reached():
    """The pool is 4 GiB of address space; only the pages of five slots are ever touched."""
    num_slots = 2**31 // 16 + 64
    pool = torch.empty((num_slots, 1, 16), dtype=torch.bfloat16)
    slots = torch.tensor([num_slots - 1, 3, num_slots - 40, 2**30 // 16 + 2, 77])
    near = torch.randn((5, 1, 16)).to(torch.bfloat16)
    pool[slots] = near
    query, positions = torch.randn((2, 2, 16)).to(torch.bfloat16), torch.tensor([4, 3])
    far_scores = token_scores(query, pool, slots, positions, scale=1.0)
    torch.testing.assert_close(far_scores, token_scores(query, near, torch.arange(5), positions, scale=1.0))
