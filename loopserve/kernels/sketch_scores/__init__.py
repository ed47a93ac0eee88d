"""Contract of `sketch_scores`: about the attention weight that the newest queries give to every cached token, from sketches of its keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation
from loopserve.kernels.sketch import KeySketch, sign_bytes


class SketchScores(NamedTuple):
    """What sketches tell of the attention of W rows over N columns."""

    weights: Tensor  # float32 [H, N], summed over the rows
    log_sum: Tensor  # float32 [H]: logarithm of what the weights of row 0 were divided by; -inf without rows or columns


def sketch_scores(query: Tensor, sketch: KeySketch, slots: Tensor, positions: Tensor, *, scale: float) -> SketchScores:
    """As `token_scores`, with what a sketch stands for in the place of each key; the weights sum to W a head.

    query [W, H, D] in a floating dtype; signs uint8 [S, Hkv, ceil(D / 8)] and scales [S, Hkv]; slots int64 [N]: where column c lies;
    positions int64 [W]: row w reads columns c <= positions[w] (0 <= positions[w] < N). Weights are computed in float32. Mutates
    nothing.
    """
    assert query.dim() == 3 and sketch.signs.dtype == torch.uint8, "queries [W, H, D], signs in bytes"
    assert sketch.signs.shape[2] == sign_bytes(query.shape[2]), "head dims differ"
    assert sketch.signs.shape[:2] == sketch.scales.shape, "a scale for every slot and head"
    assert query.shape[1] % sketch.signs.shape[1] == 0, "query heads are no multiple of KV heads"
    assert slots.dtype == torch.int64 and slots.dim() == 1, "slots are int64 [N]"
    assert positions.dtype == torch.int64 and positions.shape == query.shape[:1], "one int64 position a row"
    scores: SketchScores = implementation("sketch_scores", query.device.type)(
        query, sketch, slots, positions, scale=scale
    )
    return scores
