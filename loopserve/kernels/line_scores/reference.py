"""`line_scores` in plain torch, one KV head at a time: the largest intermediate is [G, R, N], never [H, R, N]."""

import torch
from torch import Tensor

from loopserve.kernels.pool import causal_weights


def line_scores(
    query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, groups: Tensor, num_groups: int, scale: float
) -> Tensor:
    """See the contract in `loopserve.kernels.line_scores`."""
    scores = query.new_zeros((query.shape[1], num_groups, slots.shape[0]), dtype=torch.float32)
    if query.shape[0] > 0 and slots.shape[0] > 0:
        for heads, weights in causal_weights(query, key_pool, slots, positions, scale=scale):
            scores[heads].index_add_(1, groups, weights)
    return scores
