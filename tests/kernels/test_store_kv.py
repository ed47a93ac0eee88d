"""`store_kv` against indexing."""

import pytest
import torch

from loopserve.kernels import store_kv


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 5), (1, 1), (2, 64), (8, 128), (1, 256)])
def test_tokens_land_in_their_slots_and_no_other_slot_changes(
    num_tokens: int, dtype: torch.dtype, num_kv_heads: int, head_dim: int
):
    pools = [torch.full((20, num_kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    new = [torch.randn(num_tokens, num_kv_heads, head_dim).to(dtype) for _ in range(2)]
    slots = torch.randperm(20)[:num_tokens]
    store_kv(*new, *pools, slots)
    others = sorted(set(range(20)) - set(slots.tolist()))
    for pool, tokens in zip(pools, new, strict=True):
        assert torch.equal(pool[slots], tokens)
        assert pool[others].isnan().all()


def test_strided_tokens_are_stored_as_they_read():
    fused = torch.randn(3, 4, 2 * 5)  # [Hkv, T, 2 * D]: keys and values side by side, heads first
    key, value = fused.transpose(0, 1).split(5, dim=2)
    pools = torch.zeros(2, 8, 3, 5)
    store_kv(key, value, pools[0], pools[1], torch.tensor([6, 1, 0, 3]))
    assert torch.equal(pools[0, [6, 1, 0, 3]], key)
    assert torch.equal(pools[1, [6, 1, 0, 3]], value)


def test_channels_need_not_follow_each_other():
    key, value = torch.randn(2, 3, 5, 4).permute(0, 3, 1, 2)  # [2, T, Hkv, D], of which tokens lie side by side
    pools = torch.zeros(2, 8, 3, 5)
    store_kv(key, value, pools[0], pools[1], torch.tensor([7, 2, 5, 0]))
    assert torch.equal(pools[0, [7, 2, 5, 0]], key)
    assert torch.equal(pools[1, [7, 2, 5, 0]], value)


def test_storing_never_converts_silently():
    pool = torch.zeros(4, 1, 2)
    with pytest.raises(AssertionError, match="never converts"):
        store_kv(torch.zeros(1, 1, 2).bfloat16(), torch.zeros(1, 1, 2).bfloat16(), pool, pool, torch.tensor([0]))
