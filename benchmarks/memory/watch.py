"""Owns what is seen of compact turns while they decode: what is brought from host memory and how long that takes, and what is read.

Two watches over the process's engines, each in force inside a `with`. `watch_traffic` times the two ways by which bytes come from host
memory, and costs two looks at the clock a layer. `watch_reads` holds what every row reads against the exact weights of its own query
over all keys, which costs more than the step: nothing is to be timed under it. Neither changes what is computed. For a CPU, where what is
called has been done when it returns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AttentionInterface

from loopserve.attention import SOCKET_NAME, AttentionPlan, Context, plan_attention
from loopserve.config import DecodeSparsity
from loopserve.kernels import token_scores
from loopserve.kv.stage import Stage
from loopserve.kv.store import KVStore, Stretch
from loopserve.kv.working_set import WorkingSets


@dataclass(slots=True)
class Traffic:
    """What came from host memory, so far."""

    recalled_bytes: int = 0  # to places: keys and values of single heads
    staged_bytes: int = 0  # through the stage: whole layers, to score by keys or to measure
    seconds: float = 0.0  # finding places and bringing, of both

    def since(self, before: Traffic) -> Traffic:
        """What was added to an earlier state."""
        return Traffic(
            self.recalled_bytes - before.recalled_bytes,
            self.staged_bytes - before.staged_bytes,
            self.seconds - before.seconds,
        )

    def copy(self) -> Traffic:
        """As it is now."""
        return self.since(Traffic())


@dataclass(slots=True)
class Reads:
    """How good what was read is, one entry for each row, layer and KV head of every step in which compact turns decode."""

    recall: list[float] = field(
        default_factory=list
    )  # of the B tokens that are truly heaviest, the share that was read
    weight: list[float] = field(default_factory=list)  # exact attention weight that was read


@contextmanager
def watch_traffic() -> Iterator[Traffic]:
    """See what comes from host memory."""
    seen = Traffic()
    locate, keys, keys_and_values = WorkingSets.locate, Stage.keys, Stage.keys_and_values

    def located(self: WorkingSets, *args: Any, **kwargs: Any) -> Any:
        before, began = int(self.num_recalled), time.perf_counter()
        found = locate(self, *args, **kwargs)
        seen.seconds += time.perf_counter() - began
        seen.recalled_bytes += (int(self.num_recalled) - before) * _head_bytes(self._store)
        return found

    def far_bytes(stage: Stage, stretches: Sequence[Stretch], num_tokens: int) -> int:
        """Of the keys, or of the values, of one layer."""
        store = stage._store
        far = (s for s in stretches if s.first_slot >= store.num_slots)
        far_tokens = sum(max(0, min(s.num_tokens, num_tokens - s.first_token)) for s in far)
        return far_tokens * store.keys[0].shape[1] * _head_bytes(store) // 2

    def staged_keys(self: Stage, layer: int, stretches: Sequence[Stretch], num_tokens: int) -> Tensor:
        began = time.perf_counter()
        found = keys(self, layer, stretches, num_tokens)
        seen.seconds += time.perf_counter() - began
        seen.staged_bytes += far_bytes(self, stretches, num_tokens)
        return found

    def staged_both(self: Stage, layer: int, stretches: Sequence[Stretch], num_tokens: int) -> tuple[Tensor, Tensor]:
        before, began = seen.seconds, time.perf_counter()
        found = keys_and_values(self, layer, stretches, num_tokens)  # counts its keys itself
        seen.seconds = before + time.perf_counter() - began
        seen.staged_bytes += far_bytes(self, stretches, num_tokens)
        return found

    with (
        mock.patch.object(WorkingSets, "locate", located),
        mock.patch.object(Stage, "keys", staged_keys),
        mock.patch.object(Stage, "keys_and_values", staged_both),
    ):
        yield seen


@contextmanager
def watch_reads(budget_tokens: int, decode: DecodeSparsity) -> Iterator[Reads]:
    """See what the decode rows of compact turns read, beside the exact weights over their whole contexts.

    A token that is read counts whatever it was read for: chosen, sink or recent. The heaviest are those of largest weight, summed over the
    KV head's queries, of all that a choice made now might choose.
    """
    seen = Reads()
    locate = WorkingSets.locate
    located: list[tuple[Tensor, Tensor | None]] = []  # of one layer: columns that are read, and which of them may be

    def locating(
        self: WorkingSets,
        layer: int,
        turn_rows: Tensor,
        slots: Tensor,
        columns: Tensor,
        valid: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        found, readable = locate(self, layer, turn_rows, slots, columns, valid, **kwargs)
        located.append((columns, readable))
        return found, readable

    def socket(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        attention_plan: AttentionPlan,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        located.clear()
        done = plan_attention(
            module, query, key, value, attention_mask, scaling=scaling, attention_plan=attention_plan, **kwargs
        )
        far = _far_rows(attention_plan)
        lists = [(c[row], None if r is None else r[row]) for c, r in located for row in range(c.shape[0])]
        assert len(far) == len(lists), "every compact row asks where its columns lie, once a layer"
        for (row, context), (columns, readable) in zip(far, lists, strict=True):
            view = context.view(attention_plan, int(module.layer_idx))  # type: ignore[arg-type]
            weights = _weights(query[0, :, row], view.keys, view.slots, num_lists=columns.shape[0], scale=scaling)
            recall, weight = judge(weights, columns, readable, budget_tokens=budget_tokens, decode=decode)
            seen.recall += recall.tolist()
            seen.weight += weight.tolist()
        return done

    AttentionInterface.register(SOCKET_NAME, socket)
    try:
        with mock.patch.object(WorkingSets, "locate", locating):
            yield seen
    finally:
        AttentionInterface.register(SOCKET_NAME, plan_attention)


def judge(
    weights: Tensor, columns: Tensor, readable: Tensor | None, *, budget_tokens: int, decode: DecodeSparsity
) -> tuple[Tensor, Tensor]:
    """Of each list, which share of its truly heaviest tokens is read, and which weight: float32 [Hs] both.

    weights float32 [Hs, N], each list's of sum 1; columns int64 [Hs, M], `readable` bool [Hs, M] or None: all.
    """
    num_lists, num_columns = weights.shape
    is_read = torch.zeros((num_lists, num_columns + 1), dtype=torch.bool)  # a last one, for what may not be read
    at = columns if readable is None else torch.where(readable, columns, num_columns)
    is_read.scatter_(1, at.clamp(max=num_columns), True)
    is_read = is_read[:, :num_columns]
    candidates = weights[:, decode.sink_tokens : num_columns - decode.window_tokens]
    heaviest = candidates.topk(min(budget_tokens, candidates.shape[1]), dim=1).indices + decode.sink_tokens
    recall = is_read.gather(1, heaviest).float().mean(dim=1)
    return recall, weights.masked_fill(~is_read, 0.0).sum(dim=1)


def _weights(query: Tensor, keys: Tensor, slots: Tensor, *, num_lists: int, scale: float) -> Tensor:
    """The exact weights of one row's query [H, D], the mean over each list's heads, float32 [Hs, N]."""
    last = torch.tensor([slots.shape[0] - 1], device=query.device)
    weights = token_scores(query[None], keys, slots, last, scale=scale)  # [H, N]
    return weights.view(num_lists, -1, slots.shape[0]).mean(dim=1)


def _far_rows(plan: AttentionPlan) -> list[tuple[int, Context]]:
    """The packed rows of compact turns in decode, in the order in which attention comes to them, and their contexts."""
    ranked = [
        (group.rows.start + index, context)
        for group in plan.ranked_groups
        if group.far is not None
        for index, context in enumerate(group.far.contexts)
    ]
    sparse = [(each.row, each.context) for each in plan.sparse_decodes if each.far is not None]
    return [*ranked, *sparse]


def _head_bytes(store: KVStore) -> int:
    """Bytes of one token's key and value in one KV head of one layer."""
    keys = store.keys[0]
    return 2 * keys.shape[2] * keys.dtype.itemsize
