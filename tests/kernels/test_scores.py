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
