"""`sketch_log_sum` in plain torch, one KV head at a time, all rows at once."""

import torch
from torch import Tensor

from loopserve.kernels.sketch import KeySketch, sketched_keys


def sketch_log_sum(query: Tensor, sketch: KeySketch, slots: Tensor, valid: Tensor | None, *, scale: float) -> Tensor:
    """See the contract in `loopserve.kernels.sketch_log_sum`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_lists, num_listed = sketch.signs.shape[1], slots.shape[1], slots.shape[2]
    grouped = query.float().reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [R, Hkv, G, D]
    lists = slots.reshape(num_rows, num_kv_heads, num_lists // num_kv_heads, num_listed)  # [R, Hkv, 1 or G, M]
    per_head = []
    for kv_head in range(num_kv_heads):
        listed = lists[:, kv_head]
        keys = sketched_keys(sketch, listed.flatten(), head=kv_head, head_dim=head_dim).view(*listed.shape, head_dim)
        logits = (grouped[:, kv_head, :, None] @ keys.mT)[:, :, 0] * scale  # [R, G, M]
        if valid is not None:
            logits = logits.masked_fill(~valid.reshape(lists.shape)[:, kv_head], float("-inf"))
        per_head.append(logits.logsumexp(dim=2))
    return torch.cat(per_head, dim=1)
