"""Owns one conversation on a runner of its own: what is computed when, dense or sparse, is the caller's to say. Knows no scheduler.

Decode can run the same conversation in several rows side by side, as turns of a batch do. Every row has blocks of its own, so that none
finds in a device's caches what another just read:

    row 0   |<- computed, exact ->|<- chunk or answer under the clock ->|
    row 1+  |<- copied from row 0 ->|<- answer ->|
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.dialogue import SamplingParams, TurnId
from loopserve.loading import LoadedModel
from loopserve.methods import DECODE_RULES
from loopserve.plan import (
    BlockCopy,
    BlockId,
    CaptureOrder,
    SampleOrder,
    Segment,
    SparseDecode,
    SparsePrefill,
    StepPlan,
    StepResult,
)
from loopserve.runner import ModelRunner

_GREEDY = SampleOrder(
    SamplingParams(temperature=0.0), seed=0, output_index=0, prompt_ids=(), output_ids=(), banned_ids=()
)


class Conversation:
    """A conversation on a runner of its own, in blocks that follow each other or lie scattered, in one row or several."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        ids: Sequence[int],
        *,
        rows: int = 1,
        scattered: bool = False,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Allocates KV for all of `ids` in every row. `before_step` is called before every forward, and may raise to end it all."""
        num_blocks = -(-len(ids) // BLOCK_TOKENS)
        self._config = config
        self._device = loaded.device
        self._runner = ModelRunner(loaded, config, num_blocks=rows * num_blocks + 1)
        self._ids = tuple(ids)
        blocks = list(range(1, rows * num_blocks + 1))
        if scattered:
            random.Random(config.seed).shuffle(blocks)
        self._tables = tuple(
            tuple(BlockId(block) for block in blocks[row * num_blocks : (row + 1) * num_blocks]) for row in range(rows)
        )
        self._shared_tokens = 0  # first positions that every row has, exact and alike
        self._steps, self._turns = itertools.count(1), itertools.count(1)
        self._turn_ids: tuple[TurnId, ...] = ()  # of the rows at work
        self._ended: tuple[TurnId, ...] = ()
        self._before_step = before_step

    def extend(self, start: int, end: int) -> None:
        """Compute positions `start` to `end` of the first row exactly, in chunks."""
        self._begin(rows=1, start=start)
        step = self._config.prefill.chunk_tokens
        for at in range(start, end, step):
            self._compute(at, min(end, at + step), copies=self._share(at))

    def chunk(self, start: int, end: int, *, sparse: SparsePrefill | None) -> tuple[float, StepResult]:
        """Seconds to compute positions `start` to `end` of the first row as one chunk."""
        self._begin(rows=1, start=start)
        return self._timed(start, end, prefill=sparse)

    def answer(self, start: int, num_steps: int, *, budget_tokens: int | None) -> tuple[float, list[StepResult]]:
        """Mean seconds of `num_steps` decode steps of all rows from position `start` on; `budget_tokens` None is dense.

        The positions before the first step are computed exactly, outside the time: their queries make the first choice. Every step draws
        a token, as an engine's does, but the conversation goes on as it is.
        """
        decode = self._config.decode
        num_observed = min(
            start, self._config.prefill.chunk_tokens, DECODE_RULES[decode.method].num_observed_rows(decode)
        )
        self._begin(rows=len(self._tables), start=start)
        copies = self._share(start)
        capture = None if budget_tokens is None else CaptureOrder(decode, choose=True, budget_tokens=budget_tokens)
        self._compute(start - num_observed, start, copies=copies, capture=capture)
        seconds, results, order = 0.0, [], None
        for index in range(num_steps):
            at = start + index
            if budget_tokens is not None:
                chosen_at = start if order is None else order.chosen_at_tokens
                order = self._decode_order(index + 1, budget_tokens, context_tokens=at + 1, chosen_at_tokens=chosen_at)
            step_s, result = self._timed(at, at + 1, decode=order, sample=_GREEDY)
            seconds += step_s
            results.append(result)
        return seconds / num_steps, results

    def _decode_order(
        self, decode_step: int, budget_tokens: int, *, context_tokens: int, chosen_at_tokens: int
    ) -> SparseDecode:
        """What a scheduler orders for a turn that asks for no coverage and last chose at `chosen_at_tokens`."""
        decode = self._config.decode
        rule = DECODE_RULES[decode.method]
        choose, measure = rule.choice_due(decode_step, decode), rule.measurement_due(decode_step, decode)
        chosen_at_tokens = context_tokens if choose else chosen_at_tokens
        return SparseDecode(budget_tokens, chosen_at_tokens, measure=measure, choose=choose, dense=False)

    def _begin(self, *, rows: int, start: int) -> None:
        """End the turns before, begin one in each of so many rows. The first row is about to differ from the others from `start` on."""
        self._ended = self._turn_ids
        self._turn_ids = tuple(TurnId(next(self._turns)) for _ in range(rows))
        self._shared_tokens = min(self._shared_tokens, start)

    def _share(self, end: int) -> tuple[BlockCopy, ...]:
        """What gives the other rows the first row's positions up to `end`, where they do not have them yet."""
        if self._shared_tokens >= end:
            return ()
        first, *others = self._tables
        changed = range(self._shared_tokens // BLOCK_TOKENS, -(-end // BLOCK_TOKENS))
        self._shared_tokens = end
        return tuple(BlockCopy(first[block], table[block]) for table in others for block in changed)

    def _timed(self, start: int, end: int, **orders: Any) -> tuple[float, StepResult]:
        self._finish()
        started = time.perf_counter()
        result = self._compute(start, end, **orders)
        self._finish()
        return time.perf_counter() - started, result

    def _finish(self) -> None:
        """Wait for what the device still has to do: nothing in a step waits for all of it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _compute(self, start: int, end: int, *, copies: tuple[BlockCopy, ...] = (), **orders: Any) -> StepResult:
        """One forward of positions `start` to `end` of every row at work."""
        self._before_step()
        segments = tuple(
            Segment(
                turn_id=turn_id,
                token_ids=self._ids[start:end],
                start=start,
                block_table=table[: -(-end // BLOCK_TOKENS)],
                table_epoch=0,
                **orders,
            )
            for turn_id, table in zip(self._turn_ids, self._tables, strict=False)
        )
        return self._runner.run(StepPlan(next(self._steps), copies, segments, self._ended))
