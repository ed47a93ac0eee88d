"""`paged_decode` in plain torch: one gather, then one fused attention with the G query heads of a KV head as its query rows.

Measured at H 8, Hkv 4, D 64, float32, one core of a shared x86 machine, Hs 1, R x M = 1 x 600 and 16 x 600, best of 12: this takes 0.35
and 7.3 ms, most of it the gather. Against it: matmul and softmax 1.4x and 1.9x, the same on contiguous copies 1.9x and 1.7x,
`enable_gqa` with one row a query head 1.2x and 1.3x, bmm row by row 1.0x and 1.2x. Only one row over 4000 tokens favours bmm (0.8x).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopserve.kernels.paged_decode import LeftOut


def paged_decode(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    valid: Tensor | None,
    *,
    scale: float,
    left_out: LeftOut | None = None,
) -> Tensor:
    """See the contract in `loopserve.kernels.paged_decode`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_lists, num_listed = key_pool.shape[1], slots.shape[1], slots.shape[2]
    if num_rows == 0 or (num_listed == 0 and left_out is None):
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    bias = empty = None
    if valid is not None and num_listed > 0:
        # Padding is pointed at a slot that the list reads anyway: 0 * NaN is NaN, so a masked weight alone does not protect.
        slots = torch.where(valid, slots, slots.gather(2, valid.to(torch.uint8).argmax(dim=2, keepdim=True)))
        bias = query.new_zeros(valid.shape).masked_fill_(~valid, float("-inf"))[:, :, None]  # [R, Hs, 1, M]
        empty = ~valid.any(dim=2)  # [R, Hs]
    keys, values = (_gather(pool, slots, num_heads=num_heads) for pool in (key_pool, value_pool))  # [R, Hs', M, D]
    per_list = num_heads // (num_heads if num_lists == num_heads else num_kv_heads)
    rows = query.reshape(num_rows, num_heads // per_list, per_list, head_dim)
    if left_out is not None:
        return _beside_left_out(rows, keys, values, valid, left_out, scale=scale).to(query.dtype).view(query.shape)
    output = scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    if empty is not None:
        output = output.masked_fill(empty[:, :, None, None], 0.0)
    return output.reshape(num_rows, num_heads, head_dim)


def _beside_left_out(
    rows: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, left_out: LeftOut, *, scale: float
) -> Tensor:
    """Attention of rows [R, Hs, G, D] over keys and values [R, Hs, M, D] and one token more, float32 [R, Hs, G, D]."""
    num_rows, num_lists, per_list, _ = rows.shape
    logits = (rows.float() @ keys.float().mT) * scale  # [R, Hs, G, M]
    values = values.float()
    if valid is not None:
        logits = logits.masked_fill(~valid[:, :, None], float("-inf"))
        values = values.masked_fill(~valid[..., None], 0.0)  # 0 * NaN is NaN
    last = left_out.log_weight.view(num_rows, num_lists, per_list, 1)
    weights = torch.cat((logits, last), dim=3).softmax(dim=3)
    reads = logits.shape[3] > 0 if valid is None else valid.any(dim=2)[:, :, None, None]
    weights = weights.where(~last.isneginf() | reads, 0.0)  # 0 / 0: nothing at all to read
    value = left_out.value.float().repeat_interleave(num_lists // left_out.value.shape[1], dim=1)  # [R, Hs, D]
    return weights[..., :-1] @ values + weights[..., -1:] * value[:, :, None]


def _gather(pool: Tensor, slots: Tensor, *, num_heads: int) -> Tensor:
    num_slots, num_kv_heads, head_dim = pool.shape
    num_rows, num_lists, num_listed = slots.shape
    if num_lists == 1:
        tokens = pool.reshape(num_slots, -1).index_select(0, slots.flatten())  # whole tokens: one copy of Hkv * D each
        return tokens.view(num_rows, num_listed, num_kv_heads, head_dim).transpose(1, 2)
    head_of_list = torch.arange(num_lists, device=pool.device) // (num_lists // num_kv_heads)  # [Hs]
    flat = slots * num_kv_heads + head_of_list[:, None]
    return pool.reshape(-1, head_dim).index_select(0, flat.flatten()).view(*slots.shape, head_dim)
