"""`paged_decode` against a dense float64 softmax over the listed slots.

Lists of 300 and more tokens are longer than one program of the kernel reads, so what several read is merged.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopserve.kernels import LeftOut, paged_decode, store_kv
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


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 2), (8, 2)])
@pytest.mark.parametrize("lists", ["segment", "kv_head", "query_head"])
@pytest.mark.parametrize(("num_rows", "num_listed"), [(1, 1), (3, 37), (2, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_left_out_takes_part_as_one_more_token(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_heads: int,
    num_kv_heads: int,
    lists: str,
    num_rows: int,
    num_listed: int,
    dtype: torch.dtype,
    padded: bool,
):
    pool, query = make_pool(50, num_kv_heads, 8, dtype), random_query(num_rows, num_heads, 8, dtype)
    num_lists = {"segment": 1, "kv_head": num_kv_heads, "query_head": num_heads}[lists]
    slots = pool.slots[torch.rand(num_rows, num_lists, 50).argsort(dim=2)[:, :, :num_listed]]
    valid = torch.rand(slots.shape) < 0.5 if padded else torch.ones_like(slots, dtype=torch.bool)
    poisoned = slots.where(valid, int(pool.keys.isnan().any(dim=(1, 2)).nonzero()[0]))
    left_out = LeftOut(torch.randn(num_rows, num_heads), torch.randn(num_rows, num_kv_heads, 8).to(dtype))
    output = paged_decode(
        query, pool.keys, pool.values, poisoned, valid if padded else None, scale=0.5, left_out=left_out
    )
    expected = torch.zeros(query.shape, dtype=torch.float64)
    for row in range(num_rows):
        for head in range(num_heads):
            listed = head * num_lists // num_heads
            read, kv_head = slots[row, listed][valid[row, listed]], head // (num_heads // num_kv_heads)
            logits = pool.keys[read, kv_head].double() @ query[row, head].double() * 0.5
            weights = torch.cat((logits, left_out.log_weight[row, head, None].double())).softmax(dim=0)
            values = torch.cat((pool.values[read, kv_head], left_out.value[row, kv_head, None])).double()
            expected[row, head] = weights @ values
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=naive.TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_left_out_changes_nothing(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], padded: bool
):
    pool, query = make_pool(30, 2, 8), random_query(2, 4, 8)
    slots = pool.slots[:20].expand(2, 2, 20)
    valid = None
    if padded:
        valid = torch.rand(slots.shape) < 0.5
        valid[1, 1] = False  # nothing at all
    nothing = LeftOut(torch.full((2, 4), -torch.inf), torch.ones(2, 2, 8))
    plain = paged_decode(query, pool.keys, pool.values, slots, valid, scale=0.5)
    beside = paged_decode(query, pool.keys, pool.values, slots, valid, scale=0.5, left_out=nothing)
    torch.testing.assert_close(beside, plain, atol=naive.TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_lists", [1, 2, 4])
@pytest.mark.parametrize("num_listed", [10, 300])
def test_what_is_not_a_number_in_a_query_is_not_hidden_by_what_is_left_out(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], padded: bool, num_lists: int, num_listed: int
):
    pool, query = make_pool(num_listed, 2, 8), random_query(2, 4, 8)
    query[1, 3, 0] = torch.nan
    slots = pool.slots.expand(2, num_lists, num_listed)
    left_out = LeftOut(torch.zeros(2, 4), torch.ones(2, 2, 8))
    valid = torch.rand(slots.shape) < 0.9 if padded else None
    output = paged_decode(query, pool.keys, pool.values, slots, valid, scale=0.5, left_out=left_out)
    assert output[1, 3].isnan().all()
    assert output[:, :3].isfinite().all() and output[0].isfinite().all()


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


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads"),
    [(64, 1, 1), (64, 16, 2), (128, 4, 1), (128, 14, 2), (256, 4, 2), (13, 6, 2), (1, 5, 1), (80, 6, 1)],
)
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_any_head_dim_and_group_size(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
):
    pool = make_pool(90, num_kv_heads, head_dim, dtype)
    query = random_query(2, num_heads, head_dim, dtype, strided=True)
    slots = pool.slots[torch.rand(2, num_kv_heads, 90).argsort(dim=2)[:, :, :70]]
    valid = torch.rand(slots.shape) < 0.8
    poisoned = slots.where(valid, int(pool.keys.isnan().any(dim=(1, 2)).nonzero()[0]))
    scale = head_dim**-0.5
    output = paged_decode(query, pool.keys, pool.values, poisoned, valid, scale=scale)
    torch.testing.assert_close(
        output.double(), expected(query, pool, slots, valid, scale), atol=naive.TOLERANCE[dtype], rtol=0
    )


def listed_out_of_order(pool: Pool, num_rows: int, num_lists: int, num_listed: int) -> Tensor:
    """Lists [R, Hs, M] of which neighbours in a list lie apart in memory."""
    slots = pool.slots[torch.rand(num_rows, num_lists, len(pool.slots)).argsort(dim=2)[:, :, :num_listed]]
    return slots.permute(2, 0, 1).contiguous().permute(1, 2, 0)


@pytest.mark.parametrize("num_lists", [1, 2, 6])
@pytest.mark.parametrize(
    ("num_rows", "num_listed", "head_dim", "dtype"), [(1, 300, 128, torch.bfloat16), (2, 500, 32, torch.float32)]
)
def test_long_lists_are_read_as_one(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_lists: int,
    num_rows: int,
    num_listed: int,
    head_dim: int,
    dtype: torch.dtype,
):
    pool, query = make_pool(500, 2, head_dim, dtype), random_query(num_rows, 6, head_dim, dtype)
    slots = listed_out_of_order(pool, num_rows, num_lists, num_listed)
    every = torch.ones_like(slots, dtype=torch.bool)
    output = paged_decode(query, pool.keys, pool.values, slots, None, scale=0.1)
    tolerance = naive.TOLERANCE[dtype]
    torch.testing.assert_close(output.double(), expected(query, pool, slots, every, 0.1), atol=tolerance, rtol=0)
    valid = torch.rand(slots.shape) < 0.7
    valid[:, :, 60:250] = False  # no valid slot at all in some program's part
    valid[-1, -1] = False  # nor in a whole list
    nan = int(pool.keys.isnan().any(dim=(1, 2)).nonzero()[0])
    output = paged_decode(query, pool.keys, pool.values, slots.where(valid, nan), valid, scale=0.1)
    torch.testing.assert_close(output.double(), expected(query, pool, slots, valid, 0.1), atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_lists", [1, 2, 4])
def test_what_is_left_out_counts_once_beside_a_long_list(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], num_lists: int
):
    pool, query = make_pool(401, 2, 32), random_query(1, 4, 32)
    rest = pool.slots[400]
    slots = listed_out_of_order(Pool(pool.keys, pool.values, pool.slots[:400]), 1, num_lists, 400)
    logits = torch.einsum("hd,hd->h", query[0], pool.keys[rest].repeat_interleave(2, dim=0))
    left_out = LeftOut(0.1 * logits[None], pool.values[rest][None])
    beside = paged_decode(query, pool.keys, pool.values, slots, None, scale=0.1, left_out=left_out)
    longer = torch.cat((slots, rest.expand(1, num_lists, 1)), dim=2)
    whole = paged_decode(query, pool.keys, pool.values, longer, None, scale=0.1)
    torch.testing.assert_close(beside, whole, atol=naive.TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("num_listed", [10, 300])
def test_huge_logits_neither_overflow_nor_vanish(make_pool: Callable[..., Pool], sign: float, num_listed: int):
    pool = make_pool(num_listed, 2, 8)
    sizes = sign * (1000.0 + torch.arange(num_listed))  # logits are 800 and more apart, about 10**6 from zero
    pool.keys[pool.slots] = sizes[:, None, None].expand(-1, 2, 8)
    largest = pool.slots[sizes.argmax()]
    query, slots = torch.full((1, 4, 8), 100.0), pool.slots.expand(1, 2, num_listed)
    output = paged_decode(query, pool.keys, pool.values, slots, None, scale=1.0)
    assert torch.equal(output, pool.values[largest].repeat_interleave(2, dim=0)[None])
    more = LeftOut(torch.full((1, 4), 2e6), torch.ones(1, 2, 8))  # outweighs them all
    output = paged_decode(query, pool.keys, pool.values, slots, None, scale=1.0, left_out=more)
    assert torch.equal(output, torch.ones(1, 4, 8))


def test_slots_beyond_32_bits_are_found():
    """The last slots of a pool of more than 2**31 elements; memory that is not touched is not backed."""
    num_slots = 2**31 // 128 + 8
    pool = torch.empty((num_slots, 1, 128), dtype=torch.bfloat16)
    slots = torch.tensor([num_slots - 1, num_slots - 6, 3])
    keys = torch.randn(3, 1, 128).bfloat16()
    store_kv(keys, keys, pool, pool, slots)
    assert torch.equal(pool[slots], keys)
    query = torch.randn(1, 2, 128).bfloat16()
    output = paged_decode(query, pool, pool, slots[None, None], None, scale=0.1)
    near = paged_decode(query, keys, keys, torch.arange(3)[None, None], None, scale=0.1)
    assert torch.equal(output, near)
