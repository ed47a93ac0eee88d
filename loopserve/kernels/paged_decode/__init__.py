"""Contract of `paged_decode`: one query row a segment reads the slots it is told to, and one value for all the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What stands for the tokens that no list holds. Source: SparQ Attention's mean value, arXiv 2312.04985."""

    log_weight: Tensor  # float32 [R, H]: logarithm of what exp(scale * q k) adds up to over them; -inf: nothing
    value: Tensor  # floating [R, Hkv, D]: what each of them is taken to hold


def paged_decode(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    valid: Tensor | None,
    *,
    scale: float,
    left_out: LeftOut | None = None,
) -> Tensor:
    """Attend row r, head h over the slots listed for it; returns [R, H, D] in query's dtype.

    query [R, H, D], key_pool and value_pool [S, Hkv, D], all of one floating dtype; slots int64 [R, Hs, M], each in [0, S).
    Hs is 1 (all heads read one list: dense decode), Hkv (one list a KV head) or H (one list a query head). valid bool
    [R, Hs, M]: where it is False the slot is padding: any slot in range, whose content (NaN included) never counts; None: all are
    valid. `left_out` takes part in each softmax as one more token. A (row, list) with nothing valid and nothing left out gives zeros.
    Softmax accumulates in float32. Mutates nothing.
    """
    num_rows, num_heads, head_dim = query.shape
    assert key_pool.shape == value_pool.shape and key_pool.shape[2] == head_dim, "head dims differ"
    assert num_heads % key_pool.shape[1] == 0, "query heads are no multiple of KV heads"
    assert query.dtype == key_pool.dtype == value_pool.dtype, "query, keys and values differ in dtype"
    assert slots.dtype == torch.int64 and slots.dim() == 3 and slots.shape[0] == num_rows, "slots are int64 [R, Hs, M]"
    assert slots.shape[1] in (1, key_pool.shape[1], num_heads), "lists are per segment, per KV head or per query head"
    assert valid is None or (valid.dtype == torch.bool and valid.shape == slots.shape), "valid is bool, shaped as slots"
    assert left_out is None or left_out.log_weight.shape == (num_rows, num_heads), (
        "a weight for each row and query head"
    )
    assert left_out is None or left_out.value.shape == (num_rows, *key_pool.shape[1:]), (
        "a value for each row and KV head"
    )
    output: Tensor = implementation("paged_decode", query.device.type)(
        query, key_pool, value_pool, slots, valid, scale=scale, left_out=left_out
    )
    return output
