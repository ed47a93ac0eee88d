"""A sketch of keys: what is stored of them, and the weights that it gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopserve.kernels import KeySketch, sketch_log_sum, sketch_scores, store_sketch, token_scores
from loopserve.kernels.sketch import SCALE_DTYPE, sketch_bytes
from loopserve.kernels.store_sketch import reference
from tests.kernels import naive
from tests.kernels.conftest import DEVICE, POOL_SLOTS, Pool


def sketched(pool: Pool, store: Callable[..., None] = reference.store_sketch) -> KeySketch:
    """The sketch of a pool's tokens; all other slots are poisoned. What only reads one takes the reference's, which is made at once."""
    sketch = KeySketch.empty(POOL_SLOTS, *pool.keys.shape[1:], DEVICE)
    sketch.signs.fill_(255)
    sketch.scales.fill_(torch.nan)
    store(pool.keys[pool.slots], sketch, pool.slots)
    return sketch


@pytest.mark.parametrize("head_dim", [1, 8, 13, 64, 128, 256])
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_signs_are_packed_by_channel_and_scales_are_mean_sizes(
    make_pool: Callable[..., Pool], head_dim: int, dtype: torch.dtype
):
    pool = make_pool(9, 2, head_dim, dtype)
    sketch = sketched(pool, store_sketch)
    assert sketch.signs.shape == (POOL_SLOTS, 2, -(-head_dim // 8))
    for slot in pool.slots.tolist():
        for head in range(2):
            key, bits = pool.keys[slot, head], sketch.signs[slot, head].tolist()
            assert [bool(bits[d // 8] >> (d % 8) & 1) for d in range(head_dim)] == (key >= 0).tolist()
            assert bits[-1] >> ((head_dim - 1) % 8 + 1) == 0, "bits beyond the head are written 0"
            assert sketch.scales[slot, head] == key.float().abs().mean().bfloat16()
    others = sorted(set(range(POOL_SLOTS)) - set(pool.slots.tolist()))
    assert sketch.scales[others].isnan().all() and (sketch.signs[others] == 255).all()


def test_a_strided_key_is_sketched_as_it_reads():
    key = torch.randn(3, 4, 2 * 8).transpose(0, 1)[:, :, :8]  # heads first, beside the values
    strided, plain = (KeySketch.empty(4, 3, 8, DEVICE) for _ in range(2))
    store_sketch(key, strided, torch.arange(4))
    store_sketch(key.contiguous(), plain, torch.arange(4))
    assert torch.equal(strided.signs, plain.signs) and torch.equal(strided.scales, plain.scales)


def test_zero_is_kept_as_plus_whatever_its_sign():
    sketch = KeySketch.empty(2, 1, 8, DEVICE)
    store_sketch(torch.tensor([0.0, -0.0, -1.0, 1.0, -1.0, 0.0, -0.0, -1.0])[None, None], sketch, torch.tensor([1]))
    assert sketch.signs.flatten().tolist() == [0, 0b01101011]
    assert sketch.scales.flatten().tolist() == [0.0, 0.5]


def coarse_keys(pool: Pool, slots: Tensor) -> Tensor:
    """What the sketches of some slots stand for, float32 [..., Hkv, D]."""
    keys = pool.keys[slots].float()
    return torch.where(keys >= 0, 1.0, -1.0) * keys.abs().mean(dim=-1, keepdim=True).bfloat16().float()


ROWS = [(1, 1, 1, 1), (5, 33, 4, 2), (3, 64, 4, 4), (2, 300, 8, 1)]  # rows, columns, query heads, KV heads


@pytest.mark.parametrize(("num_rows", "num_columns", "num_heads", "num_kv_heads"), ROWS)
@pytest.mark.parametrize("head_dim", [6, 16])
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_sketch_scores_are_the_weights_of_each_rows_own_columns(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_rows: int,
    num_columns: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    per: str,
):
    pool = make_pool(num_columns, num_kv_heads, head_dim)
    sketch, query = sketched(pool), random_query(num_rows, num_heads, head_dim)
    lengths = torch.randint(num_columns + 1, (num_rows,))
    lengths[0] = num_columns
    lengths[1:2] = 0  # a row of no columns
    order = torch.rand(num_rows, num_columns).argsort(dim=1)
    slots = pool.slots[order]
    poison = int(pool.keys.isnan().any(dim=(1, 2)).nonzero()[0])
    slots = slots.where(torch.arange(num_columns) < lengths[:, None], poison)
    num_lists = num_kv_heads if per == "kv_head" else num_heads
    weights, log_sum = sketch_scores(query, sketch, slots, lengths, num_lists=num_lists, scale=0.4)
    assert weights.dtype == log_sum.dtype == torch.float32
    for row in range(num_rows):
        length = int(lengths[row])
        keys = coarse_keys(pool, slots[row, :length])
        read = torch.ones((num_heads, 1, length), dtype=torch.bool)
        of_heads = naive.weights(query[row : row + 1], keys, read, 0.4)[:, 0]  # [H, n]
        expected = of_heads.view(num_lists, num_heads // num_lists, length).sum(dim=1)
        torch.testing.assert_close(weights[row, :, :length].double(), expected, atol=1e-5, rtol=0)
        assert (weights[row, :, length:] == 0).all()
        logits = naive.logits(query[row], keys, 0.4)
        torch.testing.assert_close(log_sum[row].double(), logits.logsumexp(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_rows", "num_columns", "num_heads", "num_kv_heads"), ROWS)
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_log_sum_is_of_the_listed_tokens_alone(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_rows: int,
    num_columns: int,
    num_heads: int,
    num_kv_heads: int,
    per: str,
    padded: bool,
):
    pool = make_pool(num_columns, num_kv_heads, 16)
    sketch, query = sketched(pool), random_query(num_rows, num_heads, 16)
    num_lists = num_kv_heads if per == "kv_head" else num_heads
    slots = pool.slots[torch.rand(num_rows, num_lists, num_columns).argsort(dim=2)[:, :, : (num_columns + 1) // 2]]
    valid = torch.rand(slots.shape) < 0.6 if padded else torch.ones_like(slots, dtype=torch.bool)
    if padded:
        valid[0, 0] = False  # nothing at all
    poison = int(pool.keys.isnan().any(dim=(1, 2)).nonzero()[0])
    given = slots.where(valid, poison)
    log_sum = sketch_log_sum(query, sketch, given, valid if padded else None, scale=0.4)
    assert log_sum.dtype == torch.float32 and log_sum.shape == (num_rows, num_heads)
    for row in range(num_rows):
        for head in range(num_heads):
            kept = slots[row, head * num_lists // num_heads][valid[row, head * num_lists // num_heads]]
            logits = naive.logits(query[row], coarse_keys(pool, kept), 0.4)[head]
            torch.testing.assert_close(log_sum[row, head].double(), logits.logsumexp(dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads"),
    [(1, 5, 1), (13, 6, 2), (32, 1, 1), (64, 16, 2), (128, 7, 1), (256, 4, 2)],
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
    """Signs are exact in every dtype, and queries are not rounded: float32's tolerance holds for all."""
    pool, query = (
        make_pool(40, num_kv_heads, head_dim, dtype),
        random_query(2, num_heads, head_dim, dtype, strided=True),
    )
    sketch, scale = sketched(pool), head_dim**-0.5
    slots, lengths = pool.slots.expand(2, 40), torch.tensor([40, 17])
    weights, log_sum = sketch_scores(query, sketch, slots, lengths, num_lists=num_heads, scale=scale)
    lists = slots[:, None].expand(2, num_kv_heads, 40)
    listed = sketch_log_sum(
        query, sketch, lists, torch.arange(40) < lengths[:, None, None].expand_as(lists), scale=scale
    )
    keys = coarse_keys(pool, pool.slots)
    for row, length in enumerate(lengths.tolist()):
        logits = naive.logits(query[row], keys[:length], scale)
        torch.testing.assert_close(weights[row, :, :length].double(), logits.softmax(dim=1), atol=1e-5, rtol=0)
        torch.testing.assert_close(log_sum[row].double(), logits.logsumexp(dim=1), atol=1e-5, rtol=0)
        torch.testing.assert_close(listed[row], log_sum[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_lists", [2, 4])
def test_long_rows_are_weighed_as_one(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], num_lists: int
):
    """Of lengths that end within what one program of the kernel reads, and at its edge; slots of a row lie apart in memory."""
    pool, query = make_pool(500, 2, 32), random_query(4, 4, 32)
    sketch, lengths = sketched(pool), torch.tensor([500, 256, 257, 1])
    slots = pool.slots[torch.rand(500, 4).argsort(dim=0)].T
    assert slots.stride(1) > 1
    weights, log_sum = sketch_scores(query, sketch, slots, lengths, num_lists=num_lists, scale=0.4)
    for row, length in enumerate(lengths.tolist()):
        logits = naive.logits(query[row], coarse_keys(pool, slots[row, :length]), 0.4)
        of_lists = logits.softmax(dim=1).view(num_lists, -1, length).sum(dim=1)
        torch.testing.assert_close(weights[row, :, :length].double(), of_lists, atol=1e-5, rtol=0)
        assert (weights[row, :, length:] == 0).all()
        torch.testing.assert_close(log_sum[row].double(), logits.logsumexp(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_columns", [20, 300])
def test_what_is_not_a_number_in_a_query_shows_in_its_head_alone(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], num_columns: int
):
    pool, query = make_pool(num_columns, 2, 8), random_query(2, 4, 8)
    query[1, 3, 0] = torch.nan
    sketch, slots, lengths = sketched(pool), pool.slots.expand(2, -1), torch.full((2,), num_columns)
    weights, log_sum = sketch_scores(query, sketch, slots, lengths, num_lists=4, scale=0.5)
    listed = sketch_log_sum(query, sketch, slots[:, None].expand(2, 2, -1), None, scale=0.5)
    is_nan = torch.zeros((2, 4), dtype=torch.bool)
    is_nan[1, 3] = True
    assert torch.equal(log_sum.isnan(), is_nan) and torch.equal(listed.isnan(), is_nan)
    assert torch.equal(weights.isnan(), is_nan[:, :, None].expand_as(weights))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("num_columns", [20, 300])
def test_huge_logits_neither_overflow_nor_vanish(make_pool: Callable[..., Pool], sign: float, num_columns: int):
    pool = make_pool(num_columns, 2, 8)
    sizes = torch.arange(1.0, num_columns + 1).bfloat16().float()  # what a scale holds of them
    sizes[-1] = 1024.0
    pool.keys[pool.slots] = (sign * sizes)[:, None, None].expand(-1, 2, 8)
    sketch, slots, lengths = sketched(pool), pool.slots[None], torch.tensor([num_columns])
    weights, log_sum = sketch_scores(torch.full((1, 4, 8), 100.0), sketch, slots, lengths, num_lists=4, scale=1.0)
    largest = int((sign * sizes).argmax())  # by 800 and more
    assert torch.equal(weights, (torch.arange(num_columns) == largest).float().expand_as(weights))
    torch.testing.assert_close(log_sum, (sign * sizes * 800).max().expand(1, 4), rtol=1e-6, atol=0)


def test_slots_beyond_32_bits_are_found():
    """The last slots of a sketch of more than 2**31 bytes of signs; memory that is not touched is not backed."""
    num_slots = 2**31 // 16 + 8
    far = KeySketch(torch.empty((num_slots, 1, 16), dtype=torch.uint8), torch.empty((num_slots, 1), dtype=SCALE_DTYPE))
    slots, keys, query = torch.tensor([num_slots - 1, num_slots - 5, 2]), torch.randn(3, 1, 128), torch.randn(1, 2, 128)
    near = KeySketch.empty(3, 1, 128, DEVICE)
    store_sketch(keys, far, slots)
    store_sketch(keys, near, torch.arange(3))
    assert torch.equal(far.signs[slots], near.signs) and torch.equal(far.scales[slots], near.scales)
    of_far, of_near = (
        sketch_scores(query, sketch, places[None], torch.tensor([3]), num_lists=1, scale=0.1)
        for sketch, places in ((far, slots), (near, torch.arange(3)))
    )
    assert torch.equal(of_far.weights, of_near.weights) and torch.equal(of_far.log_sum, of_near.log_sum)


def test_keys_that_are_all_sign_lose_nothing(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    pool = make_pool(40, 2, 8)
    pool.keys[pool.slots] = pool.keys[pool.slots].sign() * torch.tensor(0.5)
    query = random_query(1, 4, 8)
    exact = token_scores(query, pool.keys, pool.slots, torch.tensor([29]), scale=0.4)
    coarse = sketch_scores(query, sketched(pool), pool.slots[None], torch.tensor([30]), num_lists=4, scale=0.4)
    torch.testing.assert_close(coarse.weights[0], exact)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 4), (2, 0)])
def test_empty_work_weighs_nothing(
    make_pool: Callable[..., Pool], random_query: Callable[..., Tensor], num_rows: int, num_columns: int
):
    pool, query = make_pool(4, 2, 8), random_query(num_rows, 2, 8)
    slots = torch.zeros((num_rows, num_columns), dtype=torch.int64)
    lengths = torch.full((num_rows,), num_columns)
    scores, log_sum = sketch_scores(query, sketched(pool), slots, lengths, num_lists=2, scale=1.0)
    assert scores.shape == (num_rows, 2, num_columns)
    assert torch.equal(log_sum, torch.full((num_rows, 2), -torch.inf))
    none = sketch_log_sum(query, sketched(pool), slots[:, None].expand(-1, 2, -1), None, scale=1.0)
    assert none.shape == (num_rows, 2) and (num_columns or none.isneginf().all())


def test_a_sketch_takes_a_bit_a_channel_and_a_scale():
    sketch = KeySketch.empty(16, 4, 128, DEVICE)
    assert sketch_bytes(128) == 18
    assert sketch.signs.nbytes + sketch.scales.nbytes == 16 * 4 * 18
