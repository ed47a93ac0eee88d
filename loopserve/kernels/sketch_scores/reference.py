"""`sketch_scores` in plain torch, one row and KV head at a time: the largest intermediate is [G, N]."""

import torch
from torch import Tensor

from loopserve.kernels.sketch import KeySketch, sketched_keys
from loopserve.kernels.sketch_scores import SketchScores


def sketch_scores(
    query: Tensor, sketch: KeySketch, slots: Tensor, lengths: Tensor, *, num_lists: int, scale: float
) -> SketchScores:
    """See the contract in `loopserve.kernels.sketch_scores`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = sketch.signs.shape[1]
    grouped = query.float().reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [R, Hkv, G, D]
    weights = torch.zeros((num_rows, num_lists, slots.shape[1]), device=query.device)
    log_sum = torch.full((num_rows, num_kv_heads, grouped.shape[2]), float("-inf"), device=query.device)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        for kv_head in range(num_kv_heads):
            keys = sketched_keys(sketch, slots[row, :length], head=kv_head, head_dim=head_dim)  # [n, D]
            logits = (grouped[row, kv_head] @ keys.T).mul_(scale)  # [G, n]
            log_sum[row, kv_head] = logits.logsumexp(dim=1)
            of_heads = logits.sub_(log_sum[row, kv_head, :, None]).exp_()
            lists = slice(kv_head * num_lists // num_kv_heads, (kv_head + 1) * num_lists // num_kv_heads)
            weights[row, lists, :length] = of_heads.sum(dim=0) if num_lists == num_kv_heads else of_heads
    return SketchScores(weights, log_sum.flatten(1))
