"""Owns sequences with long contexts on a runner of their own, and the plans of their next steps, written as the scheduler writes
them.

The contexts are not computed: the runner's store is filled with random numbers. What a decode step reads, and for how long,
depends on how many tokens there are and where they lie, not on what they hold; sparse prefill's work does depend on it (see
`ModelSize.verticals`). Blocks are handed out in random order, as in a pool long in use. Knows no clock.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.dialogue import SamplingParams, TurnId
from loopserve.kernels import store_sketch
from loopserve.loading import LoadedModel
from loopserve.methods import DECODE_RULES
from loopserve.plan import (
    PENDING_TOKEN,
    BlockId,
    CaptureOrder,
    SampleOrder,
    Segment,
    SparseDecode,
    SparsePrefill,
    StepPlan,
    StepResult,
)
from loopserve.reads import DecodeStep, read_tokens
from loopserve.runner import Launched, ModelRunner, bytes_a_block

_SLOTS_AT_A_TIME = 32_768  # of which sketches are made: bounds what that takes beside the pool
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class StepKind:
    """What a decode step does beside attending; steps of one kind take equally long."""

    choose: bool = False
    measure: bool = False


@dataclass(frozen=True, slots=True)
class DoneStep:
    """One decode step of all sequences."""

    kind: StepKind
    read_tokens: float  # tokens' worth of KV that it must read, over all sequences, by `loopserve.reads`
    result: StepResult


class FilledPool:
    """Equal sequences, each with `context_tokens` random tokens cached and room for `room_tokens` more."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        *,
        num_sequences: int,
        context_tokens: int,
        room_tokens: int,
    ) -> None:
        """Allocates the pool and fills it. Raises torch.OutOfMemoryError."""
        blocks_each = blocks_a_sequence(context_tokens, room_tokens)
        num_blocks = num_sequences * blocks_each
        config = replace(config, max_running_turns=max(config.max_running_turns, num_sequences))
        self.loaded, self.config = loaded, config
        self.num_sequences, self.context_tokens = num_sequences, context_tokens
        self._runner = ModelRunner(loaded, config, num_blocks=num_blocks + 1)
        blocks = [BlockId(block) for block in range(1, num_blocks + 1)]
        random.Random(config.seed).shuffle(blocks)
        self._blocks = [blocks[at : at + blocks_each] for at in range(0, num_blocks, blocks_each)]
        self._steps, self._turns = itertools.count(1), itertools.count(1)
        self._live: list[TurnId] = []
        self._ended: list[TurnId] = []
        _fill(self._runner, loaded, seed=config.seed)

    def new_turns(self, num: int) -> list[TurnId]:
        """The next turns; those before them end with the next plan."""
        self._ended += self._live
        self._live = [TurnId(next(self._turns)) for _ in range(num)]
        return list(self._live)

    def prompt_ids(self, sequence: int, num: int) -> tuple[int, ...]:
        """The tokens of a sequence's prompt that are computed, the same every time."""
        rng = random.Random(f"{self.config.seed} {sequence}")
        return tuple(rng.randrange(self.loaded.vocab_size) for _ in range(num))

    def blocks(self, sequence: int, num_tokens: int) -> list[BlockId]:
        """The table of a sequence that is `num_tokens` long."""
        table = self._blocks[sequence][: -(-num_tokens // BLOCK_TOKENS)]
        assert len(table) * BLOCK_TOKENS >= num_tokens, "the sequence has outgrown its room"
        return table

    def launch(self, segments: Sequence[Segment]) -> Launched:
        """One step, begun."""
        ended, self._ended = tuple(self._ended), []
        return self._runner.launch(StepPlan(next(self._steps), (), tuple(segments), ended))

    def prefill(self, num_rows: int, sparse: SparsePrefill | None) -> StepResult:
        """The last chunk of a prompt on the first sequence, `num_rows` over its context: sparse ones choose for decode, too."""
        (turn_id,), end = self.new_turns(1), self.context_tokens + num_rows
        decode = self.config.decode
        capture = CaptureOrder(decode, choose=True, budget_tokens=decode.budget_tokens)
        segment = Segment(
            turn_id=turn_id,
            token_ids=self.prompt_ids(0, num_rows),
            start=self.context_tokens,
            block_table=self.blocks(0, end),
            table_epoch=0,
            prefill=sparse,
            capture=None if sparse is None else capture,
            sample=_sample(0),
        )
        return self.launch([segment]).result()


class Answers:
    """An answer on every sequence of a pool, all at once, from the end of the context on: dense, or sparse by the pool's config.

    Steps are launched `ahead` of the one that is waited for, as the engine does: their tokens are then known to the device alone.
    """

    def __init__(self, pool: FilledPool, *, sparse: bool, ahead: int = 1) -> None:
        """Computes the last rows of each prompt, one sequence after the other; where it is sparse, they make the first choice."""
        self._pool = pool
        self._ahead = ahead
        self._decode: DecodeSparsity | None = pool.config.decode if sparse else None
        self._turns = pool.new_turns(pool.num_sequences)
        self._last_ids = [self._begin(sequence) for sequence in range(pool.num_sequences)]
        self._tables = [pool.blocks(sequence, pool.context_tokens) for sequence in range(pool.num_sequences)]
        self._launched: deque[tuple[StepKind, float, Launched]] = deque()
        self._num_launched = 0
        self._chosen_at = pool.context_tokens

    def step(self) -> DoneStep:
        """The next token of every sequence. Launches as far ahead as it may, then waits for one step."""
        while len(self._launched) <= self._ahead:
            self._launch()
        kind, tokens_read, launched = self._launched.popleft()
        result = launched.result()
        drawn = {token.turn_id: token.token_id for token in result.tokens}
        self._last_ids = [drawn[turn_id] for turn_id in self._turns]
        return DoneStep(kind, tokens_read, result)

    def _launch(self) -> None:
        pool, start = self._pool, self._pool.context_tokens + self._num_launched
        self._num_launched += 1
        order = None if self._decode is None else self._order(self._decode, start + 1)
        for sequence, table in enumerate(self._tables):
            table.extend(pool.blocks(sequence, start + 1)[len(table) :])
        segments = [
            Segment(
                turn_id=turn_id,
                token_ids=(PENDING_TOKEN if self._launched else last_id,),
                start=start,
                block_table=table,
                table_epoch=0,
                decode=order,
                sample=_sample(self._num_launched),
            )
            for turn_id, last_id, table in zip(self._turns, self._last_ids, self._tables, strict=True)
        ]
        kind = StepKind() if order is None else StepKind(order.choose, order.measure)
        tokens_read = pool.num_sequences * self._read_tokens(order, start + 1)
        self._launched.append((kind, tokens_read, pool.launch(segments)))

    def _begin(self, sequence: int) -> int:
        pool, rows, capture = self._pool, 1, None
        if self._decode is not None:
            rows = DECODE_RULES[self._decode.method].num_observed_rows(self._decode)
            capture = CaptureOrder(self._decode, choose=True, budget_tokens=self._decode.budget_tokens)
        segment = Segment(
            turn_id=self._turns[sequence],
            token_ids=pool.prompt_ids(sequence, rows),
            start=pool.context_tokens - rows,
            block_table=pool.blocks(sequence, pool.context_tokens),
            table_epoch=0,
            capture=capture,
            sample=_sample(0),
        )
        (token,) = pool.launch([segment]).result().tokens
        return token.token_id

    def _order(self, decode: DecodeSparsity, context_tokens: int) -> SparseDecode:
        rule = DECODE_RULES[decode.method]
        choose = rule.choice_due(self._num_launched, decode)
        if choose:
            self._chosen_at = context_tokens
        measure = rule.measurement_due(self._num_launched, decode)
        return SparseDecode(decode.budget_tokens, self._chosen_at, measure=measure, choose=choose, dense=False)

    def _read_tokens(self, order: SparseDecode | None, context_tokens: int) -> float:
        if order is None or self._decode is None:
            return context_tokens
        step = DecodeStep(context_tokens, self._chosen_at, order.budget_tokens, order.choose, order.measure)
        return read_tokens(step, self._decode, self._pool.loaded.shape)


def blocks_a_sequence(context_tokens: int, room_tokens: int) -> int:
    """Blocks that one sequence of a `FilledPool` has."""
    return -(-(context_tokens + room_tokens) // BLOCK_TOKENS)


def num_fitting(
    loaded: LoadedModel, config: EngineConfig, *, context_tokens: int, room_tokens: int, pool_bytes: int
) -> int:
    """How many such sequences a pool of that size holds."""
    return pool_bytes // (blocks_a_sequence(context_tokens, room_tokens) * bytes_a_block(loaded, config))


@torch.inference_mode()
def _fill(runner: ModelRunner, loaded: LoadedModel, *, seed: int) -> None:
    """Draw keys and values from the normal distribution, and make the sketches of those keys."""
    store = runner.store
    generator = torch.Generator(loaded.device).manual_seed(seed)
    for layer in range(loaded.num_layers):
        store.keys[layer].normal_(generator=generator)
        store.values[layer].normal_(generator=generator)
        if store.sketches:
            for first in range(0, store.num_slots, _SLOTS_AT_A_TIME):
                end = min(first + _SLOTS_AT_A_TIME, store.num_slots)
                slots = torch.arange(first, end, device=loaded.device)
                store_sketch(store.keys[layer][first:end], store.sketches[layer], slots)


def _sample(output_index: int) -> SampleOrder:
    return SampleOrder(params=_GREEDY, seed=0, output_index=output_index, prompt_ids=(), output_ids=(), banned_ids=())
