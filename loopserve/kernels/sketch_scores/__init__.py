"""Contract of `sketch_scores`: about the attention weight that one query row gives to every cached token, from sketches of its keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation
from loopserve.kernels.sketch import KeySketch, check_sketch


class SketchScores(NamedTuple):
    """What sketches tell of the attention of R rows, each over N columns of its own."""

    weights: Tensor  # float32 [R, Hs, N], summed over the query heads of a list; 0 past a row's length
    log_sum: Tensor  # float32 [R, H]: logarithm of what a head's weights were divided by; -inf for a row of length 0


def sketch_scores(
    query: Tensor, sketch: KeySketch, slots: Tensor, lengths: Tensor, *, num_lists: int, scale: float
) -> SketchScores:
    """Softmax row r, head h over its first `lengths[r]` columns, with what a sketch stands for in the place of each key.

    query [R, H, D] in a floating dtype; signs uint8 [S, Hkv, ceil(D / 8)] and scales [S, Hkv]; slots int64 [R, N], each in [0, S): where
    column c of row r lies; lengths int64 [R], each in [0, N]; what a sketch holds past a row's length (NaN included) never counts.
    `num_lists`, Hs, is Hkv (weights of a KV head's G query heads are added up) or H. Weights are computed in float32. Mutates nothing.
    """
    check_sketch(query, sketch)
    assert slots.dtype == torch.int64 and slots.dim() == 2 and slots.shape[0] == query.shape[0], (
        "slots are int64 [R, N]"
    )
    assert lengths.dtype == torch.int64 and lengths.shape == query.shape[:1], "one int64 length a row"
    assert num_lists in (sketch.signs.shape[1], query.shape[1]), "lists are per KV head or per query head"
    scores: SketchScores = implementation("sketch_scores", query.device.type)(
        query, sketch, slots, lengths, num_lists=num_lists, scale=scale
    )
    return scores
