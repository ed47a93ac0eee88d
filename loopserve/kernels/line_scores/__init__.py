"""Contract of `line_scores`: the dense attention weight of sampled rows, summed by group, over every column."""

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


def line_scores(
    query: Tensor, key_pool: Tensor, slots: Tensor, positions: Tensor, *, groups: Tensor, num_groups: int, scale: float
) -> Tensor:
    """Softmax each row over its causal columns and add up the rows of each group; returns float32 [H, num_groups, N].

    query [R, H, D] and key_pool [S, Hkv, D] in one floating dtype; slots int64 [N]: where column c lies; positions int64 [R]:
    row r reads columns c <= positions[r] (0 <= positions[r] < N); groups int64 [R], each in [0, num_groups). A row of a group
    adds exactly 1 to the group's total; a group without rows is zero. Weights are computed in float32. Mutates nothing.
    Source: the sampled scores of phase 1 of arXiv 2507.13681, with one group a query tile.
    """
    assert query.dim() == 3 and key_pool.dim() == 3 and query.shape[2] == key_pool.shape[2], "head dims differ"
    assert query.shape[1] % key_pool.shape[1] == 0, "query heads are no multiple of KV heads"
    assert query.dtype == key_pool.dtype, "query and keys differ in dtype"
    assert slots.dtype == torch.int64 and slots.dim() == 1, "slots are int64 [N]"
    assert positions.dtype == torch.int64 and positions.shape == query.shape[:1], "one int64 position a row"
    assert groups.dtype == torch.int64 and groups.shape == query.shape[:1], "one int64 group a row"
    scores: Tensor = implementation("line_scores", query.device.type)(
        query, key_pool, slots, positions, groups=groups, num_groups=num_groups, scale=scale
    )
    return scores
