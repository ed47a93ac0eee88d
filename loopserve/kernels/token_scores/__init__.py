"""Contract of `token_scores`: the dense attention weight that the newest queries give to every cached token."""

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


def token_scores(query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """Softmax each row over its causal columns and add up all rows; returns float32 [H, N], which sums to W a head.

    query [W, H, D] and key_pool [S, Hkv, D] in one floating dtype; slots int64 [N]: where column c lies; positions int64 [W]:
    row w reads columns c <= positions[w] (0 <= positions[w] < N). Weights are computed in float32. Mutates nothing.
    Source: the relevance scores of phase 2 of arXiv 2507.13681.
    """
    assert query.dim() == 3 and key_pool.dim() == 3 and query.shape[2] == key_pool.shape[2], "head dims differ"
    assert query.shape[1] % key_pool.shape[1] == 0, "query heads are no multiple of KV heads"
    assert query.dtype == key_pool.dtype, "query and keys differ in dtype"
    assert slots.dtype == torch.int64 and slots.dim() == 1, "slots are int64 [N]"
    assert positions.dtype == torch.int64 and positions.shape == query.shape[:1], "one int64 position a row"
    scores: Tensor = implementation("token_scores", query.device.type)(query, key_pool, slots, positions, scale=scale)
    return scores
