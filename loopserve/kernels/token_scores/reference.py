"""`token_scores` in plain torch, one KV head at a time: the largest intermediate is [G, W, N]."""

import torch
from torch import Tensor

from loopserve.kernels.pool import gather_head


def token_scores(query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """See the contract in `loopserve.kernels.token_scores`."""
    num_rows, num_heads, _ = query.shape
    num_kv_heads, num_columns = key_pool.shape[1], slots.shape[0]
    group = num_heads // num_kv_heads
    scores = query.new_zeros((num_heads, num_columns), dtype=torch.float32)
    if num_rows == 0 or num_columns == 0:
        return scores
    # Every row reads the columns before `first_hidden`: masking only the rest spares a pass that costs more than the softmax.
    first_hidden = int(positions.min()) + 1
    hidden = torch.arange(first_hidden, num_columns, device=query.device) > positions[:, None]  # [W, N - first_hidden]
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        rows = query[:, heads].transpose(0, 1).float()  # [G, W, D]
        keys = gather_head(key_pool, slots, head=kv_head).float()  # [N, D]
        logits = (rows @ keys.T).mul_(scale)  # [G, W, N]
        logits[:, :, first_hidden:].masked_fill_(hidden, float("-inf"))
        scores[heads] = torch.softmax(logits, dim=-1).sum(dim=1)
    return scores
