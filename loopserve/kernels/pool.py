"""Reads from a KV pool by slot, for the references. Knows nothing about which slots are worth reading."""

from collections.abc import Iterator

import torch
from torch import Tensor


def gather_head(pool: Tensor, slots: Tensor, *, head: int) -> Tensor:
    """One KV head of the given slots, copied: pool [S, Hkv, D], slots int64 [N] -> [N, D]."""
    return pool[:, head].index_select(0, slots)


def causal_weights(
    query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Softmax of rows [R, H, D] over their causal columns, one KV head at a time: its query heads, and float32 [G, R, N].

    Arguments as in `loopserve.kernels.line_scores`; R and N are at least 1. No larger intermediate is made.
    """
    num_kv_heads, num_columns = key_pool.shape[1], slots.shape[0]
    group = query.shape[1] // num_kv_heads
    # Every row reads the columns before `first_hidden`: masking only the rest spares a pass that costs more than the softmax.
    first_hidden = int(positions.min()) + 1
    hidden = torch.arange(first_hidden, num_columns, device=slots.device) > positions[:, None]  # [R, N - first_hidden]
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        rows = query[:, heads].transpose(0, 1).float()  # [G, R, D]
        keys = gather_head(key_pool, slots, head=kv_head).float()  # [N, D]
        logits = (rows @ keys.T).mul_(scale)  # [G, R, N]
        logits[:, :, first_hidden:].masked_fill_(hidden, float("-inf"))
        yield heads, torch.softmax(logits, dim=-1)
