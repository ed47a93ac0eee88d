"""`token_scores` in plain torch, one KV head at a time: the largest intermediate is [G, W, N]."""

import torch
from torch import Tensor

from loopserve.kernels.pool import causal_weights


def token_scores(query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """See the contract in `loopserve.kernels.token_scores`."""
    scores = query.new_zeros((query.shape[1], slots.shape[0]), dtype=torch.float32)
    if query.shape[0] > 0 and slots.shape[0] > 0:
        for heads, weights in causal_weights(query, key_pool, slots, positions, scale=scale):
            scores[heads] = weights.sum(dim=1)
    return scores
