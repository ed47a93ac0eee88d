"""`paged_decode` in plain torch: one gather, then one fused attention with the G query heads of a KV head as its query rows.

Measured at H 8, Hkv 4, D 64, float32, one core of a shared x86 machine, Hs 1, R x M = 1 x 600 and 16 x 600, best of 12: this takes 0.35
and 7.3 ms, most of it the gather. Against it: matmul and softmax 1.4x and 1.9x, the same on contiguous copies 1.9x and 1.7x,
`enable_gqa` with one row a query head 1.2x and 1.3x, bmm row by row 1.0x and 1.2x. Only one row over 4000 tokens favours bmm (0.8x).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def paged_decode(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor, valid: Tensor | None, *, scale: float
) -> Tensor:
    """See the contract in `loopserve.kernels.paged_decode`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_lists, num_listed = key_pool.shape[1], slots.shape[1], slots.shape[2]
    if num_rows == 0 or num_listed == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    bias = empty = None
    if valid is not None:
        # Padding is pointed at a slot that the list reads anyway: 0 * NaN is NaN, so a masked weight alone does not protect.
        slots = torch.where(valid, slots, slots.gather(2, valid.to(torch.uint8).argmax(dim=2, keepdim=True)))
        bias = query.new_zeros(valid.shape).masked_fill_(~valid, float("-inf"))[:, :, None]  # [R, Hs, 1, M]
        empty = ~valid.any(dim=2)  # [R, Hs]
    keys, values = (_gather(pool, slots, num_heads=num_heads) for pool in (key_pool, value_pool))  # [R, Hs', M, D]
    per_list = num_heads // (num_heads if num_lists == num_heads else num_kv_heads)
    rows = query.reshape(num_rows, num_heads // per_list, per_list, head_dim)
    output = scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    if empty is not None:
        output = output.masked_fill(empty[:, :, None, None], 0.0)
    return output.reshape(num_rows, num_heads, head_dim)


def _gather(pool: Tensor, slots: Tensor, *, num_heads: int) -> Tensor:
    num_slots, num_kv_heads, head_dim = pool.shape
    num_rows, num_lists, num_listed = slots.shape
    if num_lists == 1:
        tokens = pool.reshape(num_slots, -1).index_select(0, slots.flatten())  # whole tokens: one copy of Hkv * D each
        return tokens.view(num_rows, num_listed, num_kv_heads, head_dim).transpose(1, 2)
    head_of_list = torch.arange(num_lists, device=pool.device) // (num_lists // num_kv_heads)  # [Hs]
    flat = slots * num_kv_heads + head_of_list[:, None]
    return pool.reshape(-1, head_dim).index_select(0, flat.flatten()).view(*slots.shape, head_dim)
