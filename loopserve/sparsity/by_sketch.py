"""Phase 2 for a batch of decode rows whose methods rank all tokens by sketches at every output. Hop 8 of the turn.

Nothing is kept from step to step, and shapes alone say what is computed: every length and budget is a tensor, no result comes back to
the host, so a device can replay the whole step. It reads what `TurnSelection` would read for each row by itself (a test holds the two
together). Source: phase 2 of arXiv 2507.13681; the sketch and the mean value are in `loopserve.kernels`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopserve.config import DecodeSparsity
from loopserve.kernels import KeySketch, LeftOut, paged_decode, sketch_log_sum, sketch_scores, token_scores


@dataclass(frozen=True, slots=True)
class RankedRows:
    """R decode rows, each over columns of its own."""

    slots: Tensor  # int64 [R, N]: where column c of a row lies; past its length any slot in range
    lengths: Tensor  # int64 [R]: tokens of each context, the step's own included
    budgets: Tensor  # int64 [R]: tokens that each list may choose
    width: int  # tokens that are ranked: no budget is larger
    is_full: bool  # every row chooses `width` tokens beside its sinks and window: no list has padding
    num_measured: int  # the first rows: the dense weight that they read is measured, by all keys


class Reach(Protocol):
    """How rows get at keys and values that are not all on the device."""

    def locate(self, columns: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Where chosen columns int64 [R, Hs, M] can be read: slots of the pool, and which of them may be, bool [R, Hs, M] or None: all."""

    def keys(self, row: int) -> tuple[Tensor, Tensor]:
        """All keys of one row: [S', Hkv, D], and where in them its columns lie, int64 [N]."""


def attend_ranked(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    sketch: KeySketch,
    rows: RankedRows,
    *,
    reach: Reach | None = None,
    mean_value: Tensor | None,
    config: DecodeSparsity,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Let row r, head h read sinks, its heaviest tokens by sketch and its newest.

    query [R, H, D]; pools [S, Hkv, D]; `reach` None: `rows.slots` lie in them, else in the sketches only. mean_value float32 [R, Hkv, D]
    stands for all that is not read, if it is wanted. Returns the attention [R, H, D] in query's dtype, and the coverage of the measured
    rows, float32 [measured, H]. Mutates nothing but what `reach` brings.
    """
    num_lists = query.shape[1] if config.select_per == "query_head" else key_pool.shape[1]
    weights, log_sum = sketch_scores(query, sketch, rows.slots, rows.lengths, num_lists=num_lists, scale=scale)
    columns, valid = _kept_columns(weights, rows, config)
    listed = rows.slots.gather(1, columns.flatten(1)).view(columns.shape)  # [R, Hs, M]
    slots = listed
    if reach is not None:
        slots, valid = reach.locate(columns, valid)
    left_out = None
    if mean_value is not None:
        held = sketch_log_sum(query, sketch, listed, valid, scale=scale)
        share = torch.expm1(held - log_sum).neg().clamp(min=0.0)  # of the weight, outside; rounding may exceed
        left_out = LeftOut(log_sum + share.log(), mean_value)
    output = paged_decode(query, key_pool, value_pool, slots, valid, scale=scale, left_out=left_out)
    return output, _coverage(query, key_pool, rows, columns, valid, reach=reach, scale=scale)


def _coverage(
    query: Tensor,
    key_pool: Tensor,
    rows: RankedRows,
    columns: Tensor,
    valid: Tensor | None,
    *,
    reach: Reach | None,
    scale: float,
) -> Tensor:
    """Dense weight that the measured rows' lists hold, float32 [measured, H]."""
    num_heads, num_lists = query.shape[1], columns.shape[1]
    coverage = query.new_zeros((rows.num_measured, num_heads), dtype=torch.float32)
    for row in range(rows.num_measured):
        keys, slots = (key_pool, rows.slots[row]) if reach is None else reach.keys(row)
        weights = token_scores(query[row : row + 1], keys, slots, rows.lengths[row : row + 1] - 1, scale=scale)
        listed = columns[row].clamp(max=slots.shape[0] - 1)  # padding may lie behind them
        per_list = num_heads // num_lists
        held = weights.gather(1, listed.repeat_interleave(per_list, dim=0))  # [H, M]
        if valid is not None:
            held = held.masked_fill(~valid[row].repeat_interleave(per_list, dim=0), 0.0)
        coverage[row] = held.sum(dim=1)
    return coverage.clamp(max=1.0)  # rounding may exceed


def _kept_columns(weights: Tensor, rows: RankedRows, config: DecodeSparsity) -> tuple[Tensor, Tensor | None]:
    """What each list of [R, Hs, N] reads, as `loopserve.methods.Layout` draws it: (int64 [R, Hs, M], valid bool [R, Hs, M] or None: all).

    M = sinks + ranked + window, whatever the lengths are. Mutates `weights`.
    """
    num_rows, num_lists, num_columns = weights.shape
    device = weights.device
    num_sinks, window = config.sink_tokens, config.window_tokens
    lengths = rows.lengths[:, None]  # [R, 1]
    recent_start = torch.maximum(lengths.clamp(max=num_sinks), lengths - window)
    closed = torch.arange(num_columns, device=device) >= recent_start  # [R, N]
    closed[:, :num_sinks].fill_(True)
    ranked = weights.masked_fill_(closed[:, None], -1.0).topk(min(rows.width, num_columns), dim=2).indices
    sinks = torch.arange(num_sinks, device=device).expand(num_rows, -1)  # [R, S]
    recent = lengths - window + torch.arange(window, device=device)  # [R, W]
    first, last = (
        part.clamp(min=0, max=num_columns - 1)[:, None].expand(-1, num_lists, -1) for part in (sinks, recent)
    )
    columns = torch.cat((first, ranked, last), dim=2)
    if rows.is_full:
        return columns, None
    num_chosen = torch.minimum(rows.budgets[:, None], (recent_start - num_sinks).clamp(min=0))
    is_chosen = torch.arange(ranked.shape[2], device=device) < num_chosen
    valid = torch.cat((sinks < lengths, is_chosen, recent >= lengths.clamp(max=num_sinks)), dim=1)  # [R, M]
    return columns, valid[:, None].expand(columns.shape)
