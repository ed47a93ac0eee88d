"""`store_kv` in Triton: one launch, a program a token, which copies the key and the value of all its heads.

Bytes: each key and value is read once and written once; a slot index, 8 bytes, is read once a token. A token's heads are one run in the
pool (2 KiB at Hkv 8, D 128, 16 bits), so writes fill whole lines; reads do where the new keys' last dimension is contiguous.
Rejected: a program a token and head, which reads each index Hkv times and leaves a warp's work to a program; a launch for keys and one
for values, as the reference has it, which costs a decode step a launch a layer.
"""

import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.tiles import tile_size

# From arithmetic, not measured yet: a warp's 32 lanes copy 16 bytes each, 256 elements of 16 bits, at a time. 4 warps take a token of
# Hkv 8, D 128 in one turn, and hold 8 elements of keys and 8 of values a thread.
NUM_WARPS = 4


def store_kv(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> None:
    """See the contract in `loopserve.kernels.store_kv`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    _store_token[(num_tokens,)](
        key,
        value,
        key_pool,
        value_pool,
        slots,
        slots.stride(0),
        *key.stride(),
        *value.stride(),
        *key_pool.stride(),
        *value_pool.stride(),
        NUM_HEADS=num_kv_heads,
        HEADS_TILE=tile_size(num_kv_heads, least=1),
        HEAD_DIM=head_dim,
        DIM_TILE=tile_size(head_dim, least=1),
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["slots", "slots_token"])
def _store_token(
    key,
    value,
    key_pool,
    value_pool,
    slots,
    slots_token,
    key_token,
    key_head,
    key_dim,
    value_token,
    value_head,
    value_dim,
    key_pool_slot,
    key_pool_head,
    key_pool_dim,
    value_pool_slot,
    value_pool_head,
    value_pool_dim,
    NUM_HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """Copy one token. Arguments named `x_y` are the strides of x along y, in elements."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_token)
    heads = tl.arange(0, HEADS_TILE)[:, None].to(tl.int64)
    dims = tl.arange(0, DIM_TILE)[None, :]
    inside = (heads < NUM_HEADS) & (dims < HEAD_DIM)
    new_key = tl.load(key + token * key_token + heads * key_head + dims * key_dim, mask=inside)
    new_value = tl.load(value + token * value_token + heads * value_head + dims * value_dim, mask=inside)
    tl.store(key_pool + slot * key_pool_slot + heads * key_pool_head + dims * key_pool_dim, new_key, mask=inside)
    tl.store(
        value_pool + slot * value_pool_slot + heads * value_pool_head + dims * value_pool_dim, new_value, mask=inside
    )
