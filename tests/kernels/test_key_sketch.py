"""A sketch of keys: what is stored of them, and the weights that it gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopserve.kernels import KeySketch, sketch_scores, store_sketch, token_scores
from loopserve.kernels.sketch import sketch_bytes
from tests.kernels import naive
from tests.kernels.conftest import POOL_SLOTS, Pool


def sketched(pool: Pool) -> KeySketch:
    """The sketch of a pool's tokens; all other slots are poisoned."""
    sketch = KeySketch.empty(POOL_SLOTS, *pool.keys.shape[1:], "cpu")
    sketch.signs.fill_(255)
    sketch.scales.fill_(torch.nan)
    store_sketch(pool.keys[pool.slots], sketch, pool.slots)
    return sketch


@pytest.mark.parametrize("head_dim", [1, 8, 13, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_are_packed_by_channel_and_scales_are_mean_sizes(
    make_pool: Callable[..., Pool], head_dim: int, dtype: torch.dtype
):
    pool = make_pool(9, 2, head_dim, dtype)
    sketch = sketched(pool)
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
    strided, plain = (KeySketch.empty(4, 3, 8, "cpu") for _ in range(2))
    store_sketch(key, strided, torch.arange(4))
    store_sketch(key.contiguous(), plain, torch.arange(4))
    assert torch.equal(strided.signs, plain.signs) and torch.equal(strided.scales, plain.scales)


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_heads", "num_kv_heads"), [(1, 1, 1, 1), (5, 33, 4, 2), (9, 64, 4, 4)]
)
@pytest.mark.parametrize("head_dim", [6, 16])
def test_sketch_scores_are_causal_weights_over_what_sketches_stand_for(
    make_pool: Callable[..., Pool],
    random_query: Callable[..., Tensor],
    num_rows: int,
    num_columns: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
):
    pool = make_pool(num_columns, num_kv_heads, head_dim)
    sketch, query = sketched(pool), random_query(num_rows, num_heads, head_dim)
    positions = torch.randint(num_columns, (num_rows,))
    keys = pool.keys[pool.slots]
    coarse = torch.where(keys >= 0, 1.0, -1.0) * keys.abs().mean(dim=2, keepdim=True).bfloat16().float()
    dense = naive.weights(query, coarse, naive.causal(positions, num_columns, num_heads), 0.4)
    scores, log_sum = sketch_scores(query, sketch, pool.slots, positions, scale=0.4)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), dense.sum(dim=1), atol=naive.TOLERANCE[torch.float32], rtol=0)
    seen = coarse[: int(positions[0]) + 1].repeat_interleave(num_heads // num_kv_heads, dim=1).double()  # [n, H, D]
    logits = torch.einsum("hd,nhd->hn", query[0].double(), seen) * 0.4
    torch.testing.assert_close(log_sum.double(), logits.logsumexp(dim=1), atol=naive.TOLERANCE[torch.float32], rtol=0)


def test_keys_that_are_all_sign_lose_nothing(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    pool = make_pool(40, 2, 8)
    pool.keys[pool.slots] = pool.keys[pool.slots].sign() * torch.tensor(0.5)
    query, positions = random_query(3, 4, 8), torch.tensor([5, 20, 39])
    exact = token_scores(query, pool.keys, pool.slots, positions, scale=0.4)
    torch.testing.assert_close(sketch_scores(query, sketched(pool), pool.slots, positions, scale=0.4).weights, exact)


def test_no_rows_score_zero(make_pool: Callable[..., Pool], random_query: Callable[..., Tensor]):
    pool, none = make_pool(4, 2, 8), torch.zeros(0, dtype=torch.int64)
    scores, log_sum = sketch_scores(random_query(0, 2, 8), sketched(pool), pool.slots, none, scale=1.0)
    assert torch.equal(scores, torch.zeros(2, 4))
    assert torch.equal(log_sum, torch.full((2,), -torch.inf))


def test_a_sketch_takes_a_bit_a_channel_and_a_scale():
    sketch = KeySketch.empty(16, 4, 128, "cpu")
    assert sketch_bytes(128) == 18
    assert sketch.signs.nbytes + sketch.scales.nbytes == 16 * 4 * 18
