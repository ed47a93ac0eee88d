"""`sketch_scores` in plain torch, one KV head at a time: signs are unpacked through a table, then weighed as `token_scores` does."""

import torch
from torch import Tensor

from loopserve.kernels.pool import summed_weights
from loopserve.kernels.sketch import KeySketch
from loopserve.kernels.sketch_scores import SketchScores


def sketch_scores(query: Tensor, sketch: KeySketch, slots: Tensor, positions: Tensor, *, scale: float) -> SketchScores:
    """See the contract in `loopserve.kernels.sketch_scores`."""
    num_kv_heads, head_dim = sketch.signs.shape[1], query.shape[2]
    table = _sign_table(query.device)  # [256, 8]

    def keys(kv_head: int) -> Tensor:
        """What the sketches of one head stand for, float32 [N, D]."""
        signs = table[sketch.signs[:, kv_head].index_select(0, slots).long()].flatten(1)[:, :head_dim]
        return signs * sketch.scales[:, kv_head].index_select(0, slots).float()[:, None]

    log_sum = torch.full((query.shape[1],), float("-inf"), device=query.device)
    weights = summed_weights(query, keys, num_kv_heads, slots.shape[0], positions, scale=scale, first_log_sum=log_sum)
    return SketchScores(weights, log_sum)


def _sign_table(device: torch.device) -> Tensor:
    """The eight signs of every byte, float32 [256, 8]."""
    byte = torch.arange(256, device=device)[:, None]
    return ((byte >> torch.arange(8, device=device)) & 1).float() * 2 - 1
