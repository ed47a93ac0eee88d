"""Reads from a KV pool by slot, and the weights that follow, for the references. Knows nothing about which slots are worth reading."""

from collections.abc import Callable

import torch
from torch import Tensor


def gather_head(pool: Tensor, slots: Tensor, *, head: int) -> Tensor:
    """One KV head of the given slots, copied: pool [S, Hkv, D], slots int64 [N] -> [N, D]."""
    return pool[:, head].index_select(0, slots)


def summed_weights(
    query: Tensor,
    keys: Callable[[int], Tensor],
    num_kv_heads: int,
    num_columns: int,
    positions: Tensor,
    *,
    scale: float,
    first_log_sum: Tensor | None = None,
) -> Tensor:
    """Softmax of rows [W, H, D] over their causal columns, summed over the rows: float32 [H, N].

    `keys` gives one KV head's, float32 [N, D], so that the largest intermediate is [G, W, N]. Into `first_log_sum`, float32 [H], goes
    the logarithm of what the first row's weights were divided by.
    """
    num_heads = query.shape[1]
    group = num_heads // num_kv_heads
    scores = query.new_zeros((num_heads, num_columns), dtype=torch.float32)
    if query.shape[0] == 0 or num_columns == 0:
        return scores
    # Every row reads the columns before `first_hidden`: masking only the rest spares a pass that costs more than the softmax.
    first_hidden = int(positions.min()) + 1
    hidden = torch.arange(first_hidden, num_columns, device=query.device) > positions[:, None]  # [W, N - first_hidden]
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        rows = query[:, heads].transpose(0, 1).float()  # [G, W, D]
        logits = (rows @ keys(kv_head).T).mul_(scale)  # [G, W, N]
        logits[:, :, first_hidden:].masked_fill_(hidden, float("-inf"))
        scores[heads] = torch.softmax(logits, dim=-1).sum(dim=1)
        if first_log_sum is not None:
            first_log_sum[heads] = logits[:, 0].logsumexp(dim=-1)
    return scores
