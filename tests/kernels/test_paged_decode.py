"""`paged_decode` against a dense float64 softmax over the listed slots."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopserve.kernels import paged_decode
from tests.kernels import naive
from tests.kernels.conftest import Pool

DTYPES = [torch.float32, torch.bfloat16]


def expected(query: Tensor, pool: Pool, slots: Tensor, valid: Tensor, scale: float):
    num_rows, num_heads = query.shape[:2]
    read = torch.zeros((num_heads, num_rows, len(pool.keys)), dtype=torch.bool)
    for row in range(num_rows):
        for head in range(num_heads):
            listed = head * slots.shape[1] // num_heads
            read[head, row, slots[row, listed][valid[row, listed]]] = True
    return naive.attention(query, pool.keys, pool.values, read, scale)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 2), (8, 2)])
@pytest.mark.parametrize("lists", ["segment", "kv_head", "query_head"])
@pytest.mark.parametrize(("num_rows", "num_listed"), [(1, 1), (3, 37)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_each_head_reads_its_list_and_no_padding(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_heads: int,
    num_kv_heads: int,
    lists: str,
    num_rows: int,
    num_listed: int,
    dtype: torch.dtype,
    strided: bool,
):
    pool = make_pool(200, num_kv_heads, 8, dtype)
    query = random_query(num_rows, num_heads, 8, dtype, strided=strided)
    num_lists = {"segment": 1, "kv_head": num_kv_heads, "query_head": num_heads}[lists]
    picks = torch.rand(num_rows, num_lists, 200).argsort(dim=2)[:, :, :num_listed]
    slots = pool.slots[picks]
    every = torch.ones_like(slots, dtype=torch.bool)
    tolerance = naive.TOLERANCE[dtype]
    output = paged_decode(query, pool.keys, pool.values, slots, None, scale=0.5)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected(query, pool, slots, every, 0.5), atol=tolerance, rtol=0)
    valid = torch.rand(slots.shape) < 0.6
    poisoned = slots.where(valid, int(pool.keys.isnan().any(dim=(1, 2)).nonzero()[0]))
    output = paged_decode(query, pool.keys, pool.values, poisoned, valid, scale=0.5)
    torch.testing.assert_close(output.double(), expected(query, pool, slots, valid, 0.5), atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_lists", [1, 2, 4])
def test_a_row_with_nothing_valid_gives_zeros_even_over_poison(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], num_lists: int
):
    pool = make_pool(9, 2, 8)
    poison = int(pool.keys.isnan().any(dim=(1, 2)).nonzero()[0])
    slots = torch.full((2, num_lists, 3), poison)
    slots[1] = pool.slots[:3]
    valid = torch.tensor([False, True])[:, None, None].expand(slots.shape)
    output = paged_decode(random_query(2, 4, 8), pool.keys, pool.values, slots, valid, scale=1.0)
    assert (output[0] == 0).all()
    assert output[1].isfinite().all()
    assert (output[1] != 0).any()


@pytest.mark.parametrize(("num_rows", "num_listed"), [(0, 5), (2, 0)])
def test_empty_work_gives_zeros(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], num_rows: int, num_listed: int
):
    pool = make_pool(9, 2, 8)
    slots = torch.zeros((num_rows, 1, num_listed), dtype=torch.int64)
    output = paged_decode(random_query(num_rows, 4, 8), pool.keys, pool.values, slots, None, scale=1.0)
    assert torch.equal(output, torch.zeros(num_rows, 4, 8))
