"""`sketch_scores` in plain torch, one row at a time: the largest intermediates are [H, N] and the bytes of signs, as integers."""

import torch
from torch import Tensor

from loopserve.kernels.sketch import KeySketch, sketched_products
from loopserve.kernels.sketch_scores import SketchScores


def sketch_scores(
    query: Tensor, sketch: KeySketch, slots: Tensor, lengths: Tensor, *, num_lists: int, scale: float
) -> SketchScores:
    """See the contract in `loopserve.kernels.sketch_scores`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = sketch.signs.shape[1]
    grouped = query.float().reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [R, Hkv, G, D]
    kv_heads = torch.arange(num_kv_heads, device=query.device)[:, None]
    weights = torch.zeros((num_rows, num_lists, slots.shape[1]), device=query.device)
    log_sum = torch.full((num_rows, num_kv_heads, grouped.shape[2]), float("-inf"), device=query.device)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        keys = slots[row, :length] * num_kv_heads + kv_heads  # [Hkv, n]
        logits = sketched_products(grouped[row] * scale, sketch, keys)  # [Hkv, G, n]
        log_sum[row] = logits.logsumexp(dim=2)
        of_heads = logits.sub_(log_sum[row, :, :, None]).exp_()
        weights[row, :, :length] = of_heads.sum(dim=1) if num_lists == num_kv_heads else of_heads.flatten(0, 1)
    return SketchScores(weights, log_sum.flatten(1))
