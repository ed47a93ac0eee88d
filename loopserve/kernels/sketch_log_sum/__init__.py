"""Contract of `sketch_log_sum`: about how much attention weight one query row gives to some cached tokens together."""

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation
from loopserve.kernels.sketch import KeySketch, check_sketch


def sketch_log_sum(query: Tensor, sketch: KeySketch, slots: Tensor, valid: Tensor | None, *, scale: float) -> Tensor:
    """Logarithm of what exp(scale * q k) adds up to over the slots listed for each head, k from sketches; returns float32 [R, H].

    Less the `log_sum` of `sketch_scores` it is the share of a row's weight that a list holds. query [R, H, D] in a floating dtype;
    signs uint8 [S, Hkv, ceil(D / 8)] and scales [S, Hkv]; slots int64 [R, Hs, M], each in [0, S), Hs being Hkv (one list a KV head) or
    H; valid bool [R, Hs, M]: where it is False the slot is padding, whose content (NaN included) never counts; None: all are valid.
    A list with nothing valid gives -inf. Computed in float32. Mutates nothing.
    """
    check_sketch(query, sketch)
    assert slots.dtype == torch.int64 and slots.dim() == 3 and len(slots) == len(query), "slots are int64 [R, Hs, M]"
    assert slots.shape[1] in (sketch.signs.shape[1], query.shape[1]), "lists are per KV head or per query head"
    assert valid is None or (valid.dtype == torch.bool and valid.shape == slots.shape), "valid is bool, shaped as slots"
    log_sum: Tensor = implementation("sketch_log_sum", query.device.type)(query, sketch, slots, valid, scale=scale)
    return log_sum
